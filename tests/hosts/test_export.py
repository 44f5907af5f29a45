"""Several processes export: the chief writes, and all go on."""

from __future__ import annotations

import pytest
import torch

from tests.hosts.linear import rows
from tpuspec.export import load

pytestmark = pytest.mark.slow


def test_the_chief_exports_the_weights_in_memory_and_those_of_a_checkpoint(run_hosts):
    outcome = run_hosts(2, "train,export,predict", steps=4, save=2)
    chief, other = outcome.results()
    assert other["exports"] == ["", ""] and not (outcome.out / "export1").exists()
    first, second = (load(path) for path in chief["exports"])
    assert (first.global_step, second.global_step) == (4, 4)
    served = first(rows()[0])
    assert torch.equal(served["logits"], second(rows()[0])["logits"])
    assert served["first"].tolist() == chief["predictions"]


def test_every_checkpoint_is_evaluated_by_all_when_the_chief_says_so_and_exported_by_it(run_hosts):
    outcome = run_hosts(2, "train_and_evaluate", steps=6, save=2)
    chief, other = outcome.results()
    assert chief["metrics"] == other["metrics"] and chief["metrics"]["global_step"] == 6
    assert other["exports"] == []
    folder = outcome.out / "run0" / "export" / "latest"
    assert sorted(load(path).global_step for path in folder.iterdir()) == [2, 4, 6]
    assert not (outcome.out / "run1" / "export").exists()
