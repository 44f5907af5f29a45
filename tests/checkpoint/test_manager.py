import os

import pytest

from tpuspec.checkpoint.manager import CheckpointManager
from tpuspec.checkpoint.policy import RetentionPolicy, SavePolicy
from tpuspec.checkpoint.state import TrainingState
from tpuspec.checkpoint.store import CheckpointStore
from tpuspec.errors import CheckpointError


def _manager(model_dir, *, clock=lambda: 0.0, max_to_keep: int | None = 2, hours=None) -> CheckpointManager:
    store = CheckpointStore(model_dir, clock=clock)
    store.prepare()
    return CheckpointManager(store, SavePolicy(10, None),
                             RetentionPolicy(max_to_keep=max_to_keep, keep_every_n_hours=hours))


def test_a_run_saves_at_its_distances_and_at_its_end(tmp_path):
    manager = _manager(tmp_path, max_to_keep=None)
    for step in range(27):
        if manager.save_policy.should_save(step):
            manager.save(TrainingState(global_step=step))
    if manager.save_policy.should_save_last(26):
        manager.save(TrainingState(global_step=26))
    assert manager.store.steps() == [0, 10, 20, 26]


def test_the_newest_are_kept(tmp_path):
    manager = _manager(tmp_path)
    for step in range(4):
        path = manager.save(TrainingState(global_step=step))
        assert path == manager.store.latest()
    assert manager.store.steps() == [2, 3]


def test_retention_goes_on_over_restarts(tmp_path):
    minutes = iter(range(0, 10_000, 40))
    for start in (0, 4, 8):
        manager = _manager(tmp_path, clock=lambda: next(minutes) * 60.0, max_to_keep=1, hours=1)
        for step in range(start, start + 4):
            manager.save(TrainingState(global_step=step))
    # Minutes 80, 160, 200, 280, 320, 400 follow a full hour first; 440 is the newest.
    assert manager.store.steps() == [2, 4, 5, 7, 8, 10, 11]


def test_fault_52_a_clock_that_jumps_back_changes_neither_the_order_nor_the_distance_of_checkpoints(
        tmp_path, monkeypatch):
    monotonic = iter(float(second) for second in range(0, 1000, 50))
    manager = CheckpointManager(
        CheckpointStore(tmp_path), SavePolicy(None, 60, clock=lambda: next(monotonic)),
        RetentionPolicy(max_to_keep=2, keep_every_n_hours=None))
    manager.store.prepare()
    for step in range(6):
        seconds = 2e9 - 1e6 * step
        monkeypatch.setattr("time.time", lambda seconds=seconds: seconds)
        if manager.save_policy.should_save(step):
            path = manager.save(TrainingState(global_step=step))
            os.utime(path, (seconds, seconds))
            assert manager.store.latest() == path
    assert manager.store.steps() == [2, 4]


def test_nothing_is_deleted_or_marked_when_the_save_fails(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    manager = _manager(tmp_path, max_to_keep=1)
    manager.save(TrainingState(global_step=1))
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        with pytest.raises(CheckpointError, match="No space left"):
            manager.save(TrainingState(global_step=2))
    assert manager.store.steps() == [1]
    assert manager.save_policy.last_saved_step == 1


def test_what_was_just_saved_is_kept_though_later_steps_exist(tmp_path):
    _manager(tmp_path).save(TrainingState(global_step=100))
    manager = _manager(tmp_path, max_to_keep=1)
    path = manager.save(TrainingState(global_step=50))
    assert path.exists()
    assert manager.store.steps() == [50, 100]


def test_damaged_checkpoints_are_neither_counted_nor_deleted(tmp_path):
    manager = _manager(tmp_path, max_to_keep=2)
    manager.save(TrainingState(global_step=1))
    (manager.save(TrainingState(global_step=2)) / "state.json").write_text("{")
    manager.save(TrainingState(global_step=3))
    assert manager.store.steps() == [1, 2, 3]
    manager.save(TrainingState(global_step=4))
    assert manager.store.steps() == [2, 3, 4]


def test_a_closed_manager_saves_nothing_more(tmp_path):
    manager = _manager(tmp_path)
    manager.close()
    manager.close()
    with pytest.raises(CheckpointError, match="manager is closed"):
        manager.save(TrainingState(global_step=1))
    assert manager.store.steps() == []
