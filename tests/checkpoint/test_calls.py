"""How often a save asks the store: each call of an object store takes tens of milliseconds."""

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from tpuspec.checkpoint.manager import CheckpointManager
from tpuspec.checkpoint.policy import RetentionPolicy, SavePolicy
from tpuspec.checkpoint.state import TrainingState
from tpuspec.checkpoint.store import CheckpointStore

COUNTED = ("ls", "info", "open", "cat_file", "pipe_file", "rm_file", "rmdir", "makedirs", "exists", "isdir")


class Counting(MemoryFileSystem):
    """Counts the calls that its user makes, not those that they make in turn."""

    protocol = "counting"
    calls = 0
    _depth = 0


def _counted(name):
    method = getattr(MemoryFileSystem, name)

    def call(self, *args, **kwargs):
        Counting.calls += not Counting._depth
        Counting._depth += 1
        try:
            return method(self, *args, **kwargs)
        finally:
            Counting._depth -= 1

    return call


for _name in COUNTED:
    setattr(Counting, _name, _counted(_name))


@pytest.fixture
def address():
    fsspec.register_implementation("counting", Counting, clobber=True)
    yield "counting://calls/run"
    Counting.store.clear()
    Counting.pseudo_dirs[:] = [""]


def test_the_eighth_save_of_a_remote_run_and_its_resume_make_few_calls(address):
    store = CheckpointStore(address)
    with store.writing():
        manager = CheckpointManager(store, SavePolicy(1, None), RetentionPolicy(max_to_keep=5))
        calls = []
        for step in range(8):
            before = Counting.calls
            manager.save(TrainingState(global_step=step, model={"w": torch.zeros(4)}))
            calls.append(Counting.calls - before)
    assert store.steps() == [3, 4, 5, 6, 7]
    assert calls[-1] <= 60, calls
    before = Counting.calls
    path = store.latest()
    assert path is not None and store.read_step(path) == 7
    assert Counting.calls - before <= 10


def test_a_damaged_remote_checkpoint_is_still_seen(address):
    store = CheckpointStore(address)
    with store.writing():
        for step in range(2):
            store.save(TrainingState(global_step=step, model={"w": torch.zeros(4)}))
        name = next(name for name in Counting.store if name.endswith("checkpoint-1/state.json"))
        Counting().pipe_file(name, b"{")
        assert [manifest.global_step for manifest in store.manifests()] == [0]
        assert str(store.latest()).endswith("checkpoint-0")
