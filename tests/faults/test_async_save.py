"""Saves while training goes on: their values, errors and deadline; one writer a folder; NaN."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from tests.faults.system_calls import SystemCalls, system_calls
from tests.regression import make_trainer, regression_rows, rows_input
from tpuspec.checkpoint.__main__ import main
from tpuspec.checkpoint.store import CheckpointStore
from tpuspec.errors import CheckpointError, HangError, NonFiniteLossError
from tpuspec.files.lock import writer_lock


@pytest.fixture
def slow_disk(monkeypatch):
    """Holds every save but the first back until the event is set."""
    go_on, real = threading.Event(), CheckpointStore.save

    def save(store, state, *joint):
        if state.global_step > 0:
            go_on.wait(20)
        return real(store, state)

    monkeypatch.setattr(CheckpointStore, "save", save)
    yield go_on
    go_on.set()


@pytest.mark.parametrize("use_tpu", [True, False])
def test_fault_12_the_saved_values_are_those_of_the_step_though_training_goes_on(tmp_path, slow_disk, use_tpu):
    def host_call(global_step, loss):
        if int(global_step[0]) == 6:
            slow_disk.set()

    def train(folder, host_call=None, **changes):
        make_trainer(tmp_path / folder, use_tpu=use_tpu, save_checkpoints_steps=4, params={"host_call": host_call},
                     **changes).train(rows_input(), max_steps=8)
        return CheckpointStore(tmp_path / folder)

    late = train("late", host_call)
    at_once = train("at once", async_checkpoints=False)
    assert late.steps() == at_once.steps() == [0, 4, 8]
    for step in (4, 8):
        ours, theirs = late.load(late.path(step)), at_once.load(at_once.path(step))
        assert all(torch.equal(ours.model[name], theirs.model[name]) for name in ours.model)
        momenta = [state.optimizers[""]["state"][0]["momentum_buffer"] for state in (ours, theirs)]
        assert torch.equal(*momenta)


@pytest.mark.parametrize("step", [4, 8], ids=["in_between", "the_last"])
def test_fault_10_an_error_of_a_save_ends_training(tmp_path, monkeypatch, step):
    real = CheckpointStore.save

    def save(store, state, *joint):
        if state.global_step == step:
            raise CheckpointError("by the test")
        return real(store, state)

    monkeypatch.setattr(CheckpointStore, "save", save)
    with pytest.raises(CheckpointError, match="by the test"):
        make_trainer(tmp_path, save_checkpoints_steps=4).train(rows_input(), max_steps=8)
    assert CheckpointStore(tmp_path).steps()[-1] == step - 4


def test_fault_11_a_save_that_hangs_ends_training_at_its_deadline(tmp_path, slow_disk):
    trainer = make_trainer(tmp_path, save_checkpoints_steps=4, checkpoint_timeout_secs=0.3)
    with pytest.raises(HangError, match=r"checkpoint of step 4 is being written for more than 0.3 s.*Mend the disk"):
        trainer.train(rows_input(), max_steps=10_000)
    slow_disk.set()


def test_fault_05_with_one_checkpoint_to_keep_the_previous_stays_until_the_next_is_whole(tmp_path, slow_disk):
    seen = []

    def host_call(global_step, loss):
        if int(global_step[0]) == 6:
            seen.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
            slow_disk.set()

    make_trainer(tmp_path, save_checkpoints_steps=4, keep_checkpoint_max=1, params={"host_call": host_call}).train(
        rows_input(), max_steps=8)
    assert seen == [["checkpoint-0"]]
    assert CheckpointStore(tmp_path).steps() == [8]


def test_fault_09_an_io_error_within_an_asynchronous_save_is_overcome(tmp_path, caplog):
    with system_calls(SystemCalls(30)):
        trainer = make_trainer(tmp_path, save_checkpoints_steps=4).train(rows_input(), max_steps=8)
    assert "Trying again" in caplog.text
    assert trainer.get_variable_value("global_step") == 8


def test_fault_51_the_second_writer_is_told_who_holds_the_folder_and_readers_go_on(tmp_path):
    trainer = make_trainer(tmp_path).train(rows_input(), max_steps=2)
    with writer_lock(tmp_path, lambda: 100.0):
        with (pytest.raises(CheckpointError, match=rf"process {os.getpid()} on host .*, for 60 s, does"),
              writer_lock(tmp_path, lambda: 160.0)):
            pass
        with pytest.raises(CheckpointError, match="One training at a time may write to model_dir"):
            trainer.train(rows_input(), max_steps=4)
        assert "loss" in trainer.evaluate(rows_input())
    assert trainer.train(rows_input(), max_steps=4).global_step() == 4


def test_fault_51_the_lock_of_a_dead_writer_is_free(tmp_path):
    source = ("import os, pathlib, signal, sys; from tpuspec.files.lock import writer_lock\n"
              "with writer_lock(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)")
    done = subprocess.run([sys.executable, "-c", source, tmp_path], check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / ".writer.json").exists()
    with writer_lock(tmp_path):
        pass


def test_fault_36_a_loss_of_nan_ends_training_and_the_last_finite_checkpoint_is_kept(tmp_path):
    x, y = regression_rows(4).tensors

    def input_fn(params):
        return [(x, y)] * 5 + [(x, y * float("nan"))] + [(x, y)] * 20

    def trainer(**changes):
        return make_trainer(tmp_path, save_checkpoints_steps=2, keep_checkpoint_max=1, **changes)

    with pytest.raises(NonFiniteLossError, match=r"The loss of step 6 is nan. .*Lower the learning rate"):
        trainer().train(input_fn, max_steps=20)
    assert CheckpointStore(tmp_path).steps() == [4]
    trainer(stop_on_nan=False).train(input_fn, max_steps=12)
    store = CheckpointStore(tmp_path)
    assert store.steps() == [4, 12]
    assert [manifest.is_finite for manifest in store.manifests()] == [True, False]


def test_the_command_line_lists_verifies_and_shows(tmp_path, capsys):
    make_trainer(tmp_path, save_checkpoints_steps=2).train(rows_input(), max_steps=2)
    for command, expected in (("list", "step          2"), ("verify", "whole"), ("show", "weight  float32 [1, 1]")):
        assert main([command, str(tmp_path)]) == 0
        assert expected in capsys.readouterr().out
    (tmp_path / "checkpoint-2" / "model.safetensors").write_bytes(b"")
    assert main(["verify", str(tmp_path)]) == 3
    out = capsys.readouterr().out
    assert "whole    " in out and "refused  " in out and "checksum mismatch in model.safetensors" in out
    assert main(["show", str(tmp_path / "eval")]) == 3
    assert "holds none" in capsys.readouterr().err
