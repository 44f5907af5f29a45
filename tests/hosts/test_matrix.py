"""The recipes on several processes: a choice of the matrix in which every layout, recipe and number of processes is."""

from __future__ import annotations

import pytest

from tests.hosts.conftest import runs
from tests.hosts.matrix import Cell, Matrix

pytestmark = pytest.mark.slow

CHOICE = [Cell(2, 1, "fsdp", "digits"), Cell(2, 2, "data x model", "gpt_bytes"), Cell(2, 2, "replicas", "tabular"),
          Cell(4, 1, "data", "tabular")]


@pytest.fixture(scope="module")
def matrix(xla_zygote, tmp_path_factory) -> Matrix:
    return Matrix(runs(xla_zygote, tmp_path_factory.mktemp("matrix")))


@pytest.mark.parametrize("cell", CHOICE, ids=str)
def test_a_recipe_on_several_processes_is_as_on_one(matrix, cell):
    assert matrix.differences(cell) == []
