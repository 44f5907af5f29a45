"""Checkpoints of a mesh over several processes: each writes its own pieces, and reads what it needs, onto any layout."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.hosts.test_xla_hosts import LAYOUTS, close
from tpuspec.checkpoint.store import CheckpointStore

pytestmark = pytest.mark.slow


def test_each_process_writes_its_pieces_and_a_run_goes_on_bit_for_bit(run_xla_hosts):
    settings = {"save": 10, "noisy": 1, "devices": 2, "tpu": LAYOUTS["fsdp"], "shared": 1}
    whole = run_xla_hosts(2, "train", **settings).results()
    outcome = run_xla_hosts(2, "train,resume", steps=20, **settings)
    results = outcome.results()
    files = [name for name in results[0]["files"] if name.startswith("checkpoint-20/")]
    print(files, outcome.stderr(0)[-2000:])
    assert results[0]["losses"] == whole[0]["losses"]
    for result, uninterrupted in zip(results, whole, strict=True):
        assert result["weights"] == uninterrupted["weights"]
        assert result["buffers"] == uninterrupted["buffers"]
