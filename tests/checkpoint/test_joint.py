"""Checkpoints that several processes write together: here threads, each with pieces of the state."""

from __future__ import annotations

import errno
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import tests.remote_folders  # noqa: F401  # knows disk://
from tpuspec.checkpoint import joint
from tpuspec.checkpoint.joint import JointSave
from tpuspec.checkpoint.manager import CheckpointManager
from tpuspec.checkpoint.policy import RetentionPolicy, SavePolicy
from tpuspec.checkpoint.state import TrainingState
from tpuspec.checkpoint.store import CheckpointStore
from tpuspec.checkpoint.stored import StoredTensor
from tpuspec.errors import CheckpointError
from tpuspec.hosts.alone import Alone
from tpuspec.spec.pieces import Piece, Pieces, is_cover

NUM_PROCESSES = 3
WEIGHT = torch.arange(24.0).reshape(6, 4)
HALF = torch.arange(6).to(torch.bfloat16)


class Together(Alone):
    """One of several processes that are threads of this one."""

    num_hosts = NUM_PROCESSES

    def __init__(self, host_index: int, posts: dict[str, str], failed: threading.Event) -> None:
        self.host_index, self.is_chief = host_index, host_index == 0
        self._posts, self._failed = posts, failed

    def post(self, name: str, text: str) -> None:
        self._posts[name] = text

    def read_post(self, name: str, *, remove: bool = False) -> str | None:
        return self._posts.pop(name, None) if remove else self._posts.get(name)

    def any_failed(self) -> bool:
        return self._failed.is_set()


@pytest.fixture(params=["folder", "address"])
def model_dir(request, tmp_path) -> str:
    return str(tmp_path / "run") if request.param == "folder" else f"disk://{tmp_path}/run"


def rows(tensor: torch.Tensor, first: int, last: int) -> Pieces:
    cut = tensor[first:last].clone()
    return Pieces(tensor.shape, tensor.dtype, (Piece((first, *[0] * (tensor.ndim - 1)), cut),) if len(cut) else ())


def state_of(process: int, step: int, value: float = 0.0) -> TrainingState:
    """What a process has: rows 0-1, 2-4 or 5 of the weight; of what lies in columns the first two have a half."""
    bounds = [0, 2, 5, 6]
    weight = rows(WEIGHT + value, bounds[process], bounds[process + 1])
    columns = Pieces(torch.Size([2, 4]), torch.float32, () if process == 2 else (
        Piece((0, 2 * process), (WEIGHT[:2, 2 * process:2 * process + 2] + value).contiguous()),))
    return TrainingState(
        global_step=step, model={"weight": weight, "half": rows(HALF, 2 * process, 2 * process + 2),
                                 "bias": torch.full((3,), value)},
        optimizers={"": {"state": {0: {"step": torch.tensor(float(step)), "momentum": columns}}, "param_groups": []}},
        extra={"input": [{"rows": 7 if process == 0 else 8}], "random": torch.arange(5, dtype=torch.uint8)})


def save(model_dir: str, step: int, value: float = 0.0, *, posts: dict[str, str] | None = None,
         store_of: Callable[[int], CheckpointStore] | None = None, failed: threading.Event | None = None,
         absent: int | None = None, make: Callable[[int, int, float], TrainingState] = state_of,
         keep: int | None = None) -> list[BaseException | None]:
    """Saves with all processes but `absent`; returns each one's error."""
    posts, failed = {} if posts is None else posts, failed or threading.Event()

    def process(index: int) -> BaseException | None:
        together = JointSave(Together(index, posts, failed))
        together._name = f"save/{step}"
        store = (store_of or (lambda _: CheckpointStore(model_dir, sleep=lambda seconds: None)))(index)
        manager = CheckpointManager(store, SavePolicy(1, None), RetentionPolicy(max_to_keep=keep),
                                    join=lambda: together)
        try:
            manager.save(make(index, step, value))
        except BaseException as error:
            return error
        return None

    CheckpointStore(model_dir).prepare()
    with ThreadPoolExecutor(NUM_PROCESSES) as pool:
        return list(pool.map(process, [index for index in range(NUM_PROCESSES) if index != absent]))


def test_the_pieces_of_all_are_one_checkpoint(model_dir):
    posts: dict[str, str] = {}
    assert save(model_dir, 4, 1.0, posts=posts) == [None] * NUM_PROCESSES
    assert list(posts) == ["save/4/1/place", "save/4/end"], "what the others wrote is read once"
    store = CheckpointStore(model_dir)
    state = store.load(store.latest())
    assert torch.equal(state.model["weight"], WEIGHT + 1)
    assert torch.equal(state.model["half"], HALF)
    assert torch.equal(state.model["bias"], torch.ones(3))
    assert torch.equal(state.optimizers[""]["state"][0]["momentum"], WEIGHT[:2] + 1)
    assert state.optimizers[""]["state"][0]["step"] == 4.0
    assert state.extra["input"] == [{"rows": 7}], "the chief's"
    assert store.verify(store.latest()).is_finite


def test_as_much_is_read_as_is_asked_for(model_dir):
    save(model_dir, 4)
    store = CheckpointStore(model_dir)
    state = store.load_stored(store.latest())
    weight = state.model["weight"]
    assert isinstance(weight, StoredTensor)
    assert (weight.shape, weight.dtype) == (WEIGHT.shape, torch.float32)
    assert isinstance(state.optimizers[""]["state"][0]["step"], torch.Tensor)
    assert torch.equal(state.extra["random"], torch.arange(5, dtype=torch.uint8))
    with state.source:
        for top, bottom, left, right in itertools.product((0, 1, 3), (2, 5, 6), (0, 2), (1, 3, 4)):
            if top < bottom and left < right:
                index = [slice(top, bottom), slice(left, right)]
                assert torch.equal(weight.read(index), WEIGHT[tuple(index)])
        assert torch.equal(state.optimizers[""]["state"][0]["momentum"].read([slice(None), slice(1, 3)]),
                           WEIGHT[:2, 1:3])
    assert torch.equal(state.model["half"].read([slice(1, 5)]), HALF[1:5])


def test_a_checkpoint_of_one_process_is_read_in_parts_too(model_dir):
    store = CheckpointStore(model_dir, max_shard_bytes=40)
    store.prepare()
    store.save(TrainingState(global_step=1, model={"w": WEIGHT, "b": HALF, "s": torch.tensor(3.0)}))
    state = store.load_stored(store.path(1))
    assert torch.equal(state.model["w"].read([slice(2, 4), slice(1, 4)]), WEIGHT[2:4, 1:4])
    assert torch.equal(state.model["b"].read(), HALF)
    assert state.model["s"] == 3.0


class Failing(CheckpointStore):
    """A store whose process cannot write its part."""

    def __init__(self, model_dir: str, error: BaseException, times: int) -> None:
        super().__init__(model_dir, sleep=lambda seconds: None)
        self._error, self._times = error, times

    def _write_part(self, *given):
        if self._times > 0:
            self._times -= 1
            raise self._error
        return super()._write_part(*given)


@pytest.mark.parametrize("failing", range(NUM_PROCESSES))
def test_what_one_cannot_write_is_not_committed_and_all_are_told(model_dir, failing):
    save(model_dir, 1)
    errors = save(model_dir, 2, store_of=lambda index: Failing(
        model_dir, OSError(errno.ENOSPC, "full"), 9 if index == failing else 0))
    assert {type(error) for error in errors} == {CheckpointError}
    assert len({str(error) for error in errors}) == 1
    assert ("full" in str(errors[0])) and "Make room" in str(errors[0])
    assert f"process {failing}" in str(errors[0]) or failing == 0
    assert CheckpointStore(model_dir).steps() == [1]
    assert torch.equal(CheckpointStore(model_dir).load(CheckpointStore(model_dir).path(1)).model["weight"], WEIGHT)


@pytest.mark.parametrize("failing", range(NUM_PROCESSES))
def test_all_write_again_after_an_error_that_passes(model_dir, failing):
    errors = save(model_dir, 2, 5.0, store_of=lambda index: Failing(
        model_dir, OSError(errno.EIO, "once"), 1 if index == failing else 0))
    assert errors == [None] * NUM_PROCESSES
    store = CheckpointStore(model_dir)
    assert torch.equal(store.load(store.latest()).model["weight"], WEIGHT + 5)


@pytest.mark.parametrize("absent", range(NUM_PROCESSES))
def test_a_process_that_is_gone_leaves_no_checkpoint(model_dir, absent, monkeypatch):
    monkeypatch.setattr(joint, "_LAST_SECONDS", 0.1)
    save(model_dir, 1)
    failed = threading.Event()
    threading.Timer(0.2, failed.set).start()
    errors = save(model_dir, 2, absent=absent, failed=failed)
    assert [type(error) for error in errors] == [CheckpointError] * (NUM_PROCESSES - 1)
    assert all("given up: one of them has failed" in str(error) for error in errors)
    CheckpointStore(model_dir).prepare()
    assert CheckpointStore(model_dir).steps() == [1]
    if "://" not in model_dir:
        assert [path.name for path in Path(model_dir).iterdir() if path.is_dir()] == ["checkpoint-1"]


def test_pieces_that_are_not_the_whole_are_refused(model_dir):
    def without_a_row(process: int, step: int, value: float) -> TrainingState:
        state = state_of(process, step, value)
        return state if process != 1 else TrainingState(
            global_step=step, model=state.model | {"weight": rows(WEIGHT, 2, 4)}, optimizers=state.optimizers)

    errors = save(model_dir, 3, make=without_a_row)
    assert {type(error) for error in errors} == {CheckpointError}
    assert "The pieces of 'weight', [6, 4], are not the whole tensor" in str(errors[0])
    assert CheckpointStore(model_dir).steps() == []


def test_a_damaged_file_of_one_process_damages_the_whole(tmp_path):
    for step in (1, 2):
        save(str(tmp_path), step, float(step))
    (file,) = (tmp_path / "checkpoint-2").glob("process-00001-model-*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    store = CheckpointStore(tmp_path)
    assert store.latest() == store.path(1)
    with pytest.raises(CheckpointError, match="checksum mismatch in process-00001-model-00001"):
        store.load(store.path(2))


def test_the_chief_deletes_what_is_no_longer_kept(model_dir):
    for step in range(4):
        assert save(model_dir, step, keep=2) == [None] * NUM_PROCESSES
    assert CheckpointStore(model_dir).steps() == [2, 3]


@pytest.mark.parametrize(("boxes", "is_whole"), [
    ([((0, 0), (2, 4)), ((2, 0), (2, 4))], True),
    ([((0, 0), (4, 2)), ((0, 2), (4, 2))], True),
    ([((0, 0), (2, 4)), ((0, 0), (2, 4))], False),
    ([((0, 0), (3, 4)), ((2, 0), (1, 4))], False),
    ([((0, 0), (2, 4))], False),
    ([((0, 0), (5, 4))], False),
    ([((0,), (16,))], False),
])
def test_parts_are_the_whole_where_each_value_is_there_once(boxes, is_whole):
    assert is_cover((4, 4), boxes) is is_whole
