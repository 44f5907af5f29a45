"""Faults of a save: every system call fails or is the last one, and a restore gives the old checkpoint or the new."""

from __future__ import annotations

import os
import shutil
import threading

import pytest

from tests.checkpoints import newest_value, state_of
from tests.faults.system_calls import Killed, SystemCalls, names, system_calls
from tests.regression import make_trainer, rows_input
from tpuspec.checkpoint.manager import CheckpointManager
from tpuspec.checkpoint.policy import RetentionPolicy, SavePolicy
from tpuspec.checkpoint.reader import Reader
from tpuspec.checkpoint.store import CheckpointStore
from tpuspec.errors import CheckpointError
from tpuspec.files import disk


def _save(model_dir, step: int, value: float, *, keep: int | None = None) -> None:
    manager = CheckpointManager(CheckpointStore(model_dir, sleep=lambda seconds: None), SavePolicy(1, None),
                                RetentionPolicy(max_to_keep=keep))
    manager.save(state_of(step, value))


def _num_calls(model_dir, step: int, keep: int | None) -> int:
    copy = model_dir.parent / "counting"
    shutil.copytree(model_dir, copy)
    with system_calls(SystemCalls()) as calls:
        _save(copy, step, 0.0, keep=keep)
    shutil.rmtree(copy)
    return len(calls.made)


CASES = [(2, None), (1, None), (2, 1)]
IDS = ["a_new_step", "the_same_step", "with_retention"]


@pytest.mark.parametrize("how", ["error", "no_space", "half", "kill"])
@pytest.mark.parametrize(("step", "keep"), CASES, ids=IDS)
def test_fault_02_04_05_13_after_a_fault_at_any_call_the_old_or_the_new_is_whole(tmp_path, step, keep, how):
    first = tmp_path / "first"
    first.mkdir()
    _save(first, 1, 1.0)
    num_calls = _num_calls(first, step, keep)
    assert num_calls >= 12
    seen = set()
    for number in range(num_calls):
        model_dir = tmp_path / f"at {number}"
        shutil.copytree(first, model_dir)
        with system_calls(SystemCalls(number, how)):
            try:
                _save(model_dir, step, 2.0, keep=keep)
                done = True
            except (Killed, CheckpointError):
                done = False
        value = newest_value(model_dir)
        assert value == 2.0 if done else value in (1.0, 2.0), number
        assert all(name.startswith("checkpoint-") for name in names(model_dir)), "prepare mends what was left"
        seen.add(value)
    # An I/O error that passes is overcome; without space there is a new one only where nothing more was to be written.
    assert seen == {"error": {2.0}, "half": {1.0, 2.0}, "kill": {1.0, 2.0}}.get(how, seen)


def test_fault_02_a_read_only_look_finds_a_whole_checkpoint_after_a_kill_at_any_call(tmp_path):
    first = tmp_path / "first"
    first.mkdir()
    _save(first, 1, 1.0)
    for number in range(_num_calls(first, 2, 1)):
        model_dir = tmp_path / f"at {number}"
        shutil.copytree(first, model_dir)
        with system_calls(SystemCalls(number, "kill")), pytest.raises(Killed, match="^$"):
            _save(model_dir, 2, 2.0, keep=1)
        store = CheckpointStore(model_dir)
        assert store.load(store.latest()).model["w"][0] in (1.0, 2.0)


class PowerLoss(SystemCalls):
    """Notes what the disk certainly has: synced bytes of files, and entries of synced folders."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple] = []

    def __getattr__(self, name):
        real = super().__getattr__(name)
        if name not in ("fsync", "replace", "unlink", "rmdir", "mkdir"):
            return real

        def call(*args, **kwargs):
            if name == "fsync":
                self.log.append(("fsync", os.readlink(f"/proc/self/fd/{args[0]}")))
            result = real(*args, **kwargs)
            self.log.append((name, *map(str, args)))
            return result

        return call


@pytest.mark.parametrize(("step", "keep"), CASES, ids=IDS)
def test_fault_03_names_reach_the_disk_after_their_bytes_and_old_ones_go_after_the_new_are_there(tmp_path, step, keep):
    _save(tmp_path, 1, 1.0)
    with system_calls(PowerLoss()) as calls:
        _save(tmp_path, step, 2.0, keep=keep)
    target = str(tmp_path / f"checkpoint-{step}")
    (commit,) = [i for i, call in enumerate(calls.log) if call[0] == "replace" and call[2] == target]
    temp = calls.log[commit][1]
    synced = {call[1] for call in calls.log[:commit] if call[0] == "fsync"}
    assert {os.path.join(temp, name) for name in os.listdir(target)} | {temp} <= synced
    parent_synced = next(i for i, call in enumerate(calls.log) if i > commit and call == ("fsync", str(tmp_path)))
    destroyed = [i for i, call in enumerate(calls.log) if call[0] in ("unlink", "rmdir")]
    assert all(i > parent_synced for i in destroyed), "nothing old is destroyed before the new name is on the disk"


def test_fault_04_a_checkpoint_that_is_read_is_not_deleted(tmp_path):
    _save(tmp_path, 1, 1.0)
    with Reader.open(tmp_path / "checkpoint-1") as reader:
        _save(tmp_path, 2, 2.0, keep=1)
        assert reader.tensors("model")[0]["w"].tolist() == [1.0] * 3
        assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    _save(tmp_path, 3, 3.0, keep=1)
    assert names(tmp_path) == ["checkpoint-3"]


@pytest.mark.parametrize("explicit", [True, False])
def test_fault_04_a_checkpoint_that_is_predicted_from_is_not_deleted(tmp_path, explicit):
    def trainer():
        return make_trainer(tmp_path, save_checkpoints_steps=2, keep_checkpoint_max=1)

    trainer().train(rows_input(), max_steps=2)
    path = tmp_path / "checkpoint-2"
    predictions = trainer().predict(rows_input(), checkpoint_path=path if explicit else None)
    next(predictions)
    other = trainer().train(rows_input(), max_steps=4)
    assert CheckpointStore(tmp_path).steps() == [2, 4]
    assert len(list(predictions)) == 15
    other.train(rows_input(), max_steps=6)
    assert CheckpointStore(tmp_path).steps() == [6]


def test_fault_04_the_newest_is_taken_where_the_one_before_was_deleted_meanwhile(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        _save(tmp_path, step, float(step))
    paths = iter([store.path(1), store.path(2)])
    monkeypatch.setattr(store, "latest", lambda: next(paths, store.path(2)))
    shutil.rmtree(store.path(1))
    with store.reading_latest() as latest:
        assert latest == store.path(2)


def test_fault_06_without_space_the_error_says_what_is_needed_and_nothing_is_pruned(tmp_path, monkeypatch):
    _save(tmp_path, 1, 1.0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(CheckpointError, match=r"It needs 24 bytes, and 1 are free"):
        _save(tmp_path, 2, 2.0, keep=1)
    assert names(tmp_path) == ["checkpoint-1"]


def test_fault_07_the_folder_for_temporary_files_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/proc/none")
    _save(tmp_path, 1, 1.0)
    assert newest_value(tmp_path) == 1.0


def test_fault_09_an_io_error_that_passes_is_overcome(tmp_path, caplog):
    _save(tmp_path, 1, 1.0)
    for number in range(4):
        with system_calls(SystemCalls(number)):
            _save(tmp_path, 2 + number, 2.0)
    assert newest_value(tmp_path) == 2.0
    assert "Trying again in 0.1 s" in caplog.text


def test_fault_09_an_io_error_that_stays_ends_the_save(tmp_path, monkeypatch):
    calls = []

    def fail(*args):
        calls.append(args)
        raise OSError(5, "Input/output error")

    _save(tmp_path, 1, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "fsync", fail)
        with pytest.raises(CheckpointError, match=r"checkpoint-2 could not be written .*Input/output error"):
            _save(tmp_path, 2, 2.0, keep=1)
    assert len(calls) == 3
    assert names(tmp_path) == ["checkpoint-1"]


def test_fault_14_the_newest_damaged_one_is_passed_over_loudly(tmp_path, caplog):
    _save(tmp_path, 1, 1.0)
    _save(tmp_path, 2, 2.0)
    file = tmp_path / "checkpoint-2" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert newest_value(tmp_path) == 1.0
    assert "checksum mismatch in model.safetensors" in caplog.text
    with pytest.raises(CheckpointError, match="checksum mismatch in model.safetensors"):
        CheckpointStore(tmp_path).load(tmp_path / "checkpoint-2")


def test_fault_55_saves_leave_no_descriptors_or_threads(tmp_path):
    _save(tmp_path, 0, 0.0)
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for step in range(1, 30):
        _save(tmp_path, step, 1.0, keep=2)
        CheckpointStore(tmp_path).load(tmp_path / f"checkpoint-{step}")
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
