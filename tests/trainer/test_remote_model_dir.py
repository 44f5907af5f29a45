"""A model_dir at an address of fsspec: train, resume, evaluate, summaries."""

from __future__ import annotations

import fsspec
import numpy as np
import pytest

from tests.regression import make_trainer, rows_input
from tpuspec.errors import CheckpointError


def test_a_run_resumes_from_an_address_bit_equal_and_writes_its_summaries_there(tmp_path):
    whole = make_trainer(tmp_path).train(rows_input(), max_steps=8)
    address = f"memory:/{tmp_path}"
    config = {"save_checkpoints_steps": 2, "keep_checkpoint_max": 2, "save_summary_steps": 2}
    make_trainer(address, **config).train(rows_input(), max_steps=5)
    later = make_trainer(address, **config).train(rows_input(), max_steps=8)
    assert later.model_dir == address
    assert later.latest_checkpoint() == f"{address}/checkpoint-8"
    for name in ("weight", "bias"):
        np.testing.assert_array_equal(whole.get_variable_value(name), later.get_variable_value(name))
    assert make_trainer(address).evaluate(rows_input()) == whole.evaluate(rows_input())
    assert make_trainer(tmp_path / "other").evaluate(
        rows_input(), checkpoint_path=later.latest_checkpoint())["global_step"] == 8
    fs, path = fsspec.url_to_fs(address)
    assert sorted(name.rpartition("/")[2] for name in fs.ls(path, detail=False) if "checkpoint" in name) == [
        "checkpoint-7", "checkpoint-8"]
    assert any("tfevents" in name for name in fs.ls(path, detail=False))
    assert any("tfevents" in name for name in fs.ls(f"{path}/eval", detail=False))
    fs.rm(path, recursive=True)


def test_two_trainers_at_one_address_are_told_apart(tmp_path):
    address = f"memory:/{tmp_path}"
    trainer = make_trainer(address)
    with trainer._store.writing(), pytest.raises(CheckpointError, match="One training at a time .*memory://"):
        make_trainer(address).train(rows_input(), max_steps=2)


def test_file_addresses_are_folders_of_this_machine(tmp_path):
    trainer = make_trainer(f"file://{tmp_path}/run").train(rows_input(), max_steps=2)
    assert trainer.model_dir == str(tmp_path / "run")
    assert trainer.latest_checkpoint() == str(tmp_path / "run" / "checkpoint-2")
    assert (tmp_path / "run" / "metrics.jsonl").exists()
