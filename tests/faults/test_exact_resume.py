"""A run that ends anywhere and goes on in a new Trainer is bit-equal to one that never stopped."""

from __future__ import annotations

import random
import shutil
import time

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

import tpuspec
from tests.regression import batch_norm_net, make_trainer, regression_rows
from tpuspec.checkpoint.store import CheckpointStore
from tpuspec.errors import CheckpointError


class NoisyRows(Dataset):
    """Rows with noise of numpy's and Python's global random state, as a user's transforms draw it."""

    def __init__(self, num_rows: int = 18) -> None:
        self._rows = regression_rows(num_rows)

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, i):
        x, y = self._rows[i]
        return x + np.float32(np.random.normal()), y + np.float32(random.random())


class Stream(IterableDataset):
    """Rows without end that can say where they stand."""

    def __init__(self):
        self._i = 0

    def __iter__(self):
        while True:
            self._i += 1
            yield torch.tensor([float(self._i % 7)]), torch.tensor([float(self._i % 5)])

    def state_dict(self):
        return {"i": self._i}

    def load_state_dict(self, state):
        self._i = state["i"]


def _adamw(module, params):
    return torch.optim.AdamW(module.parameters(), lr=1e-2)


def _trainer(model_dir, *, accumulate=1, **config):
    return make_trainer(model_dir, model=batch_norm_net, optimizer=_adamw, params={"accumulate": accumulate},
                        **{"save_checkpoints_steps": 3} | config)


def _values(trainer):
    return {name: trainer.get_variable_value(name) for name in trainer.get_variable_names()}


INPUTS = {
    "dataset": lambda params: NoisyRows(),
    "list": lambda params: [regression_rows(4).tensors] * 40,
    "stream": lambda params: Stream(),
}


@pytest.mark.parametrize("use_tpu", [True, False])
@pytest.mark.parametrize(("name", "accumulate"), [("dataset", 1), ("dataset", 2), ("list", 1), ("stream", 1)])
def test_fault_01_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path, name, accumulate, use_tpu):
    def start():
        np.random.seed(5)
        random.seed(5)

    start()
    whole = _trainer(tmp_path / "whole", accumulate=accumulate, use_tpu=use_tpu)
    whole.train(INPUTS[name], max_steps=11)
    start()
    losses = []
    for max_steps in (5, 8, 11):
        # Another seed from the second on: the checkpoint's own is what counts.
        part = _trainer(tmp_path / "parts", accumulate=accumulate, use_tpu=use_tpu, seed=3 if max_steps == 5 else None)
        part.train(INPUTS[name], max_steps=max_steps)
        np.random.seed(max_steps)
        random.seed(max_steps)
        losses.append(part.global_step())
    assert losses == [5, 8, 11]
    for key, value in _values(whole).items():
        np.testing.assert_array_equal(value, _values(part)[key], err_msg=key)


@pytest.mark.parametrize("use_tpu", [True, False])
def test_fault_01_a_run_without_a_seed_that_was_saved_at_its_start_only_goes_on_in_its_own_order(tmp_path, use_tpu):
    def train(folder):
        _trainer(tmp_path / folder, use_tpu=use_tpu, seed=None, save_checkpoints_steps=4).train(
            lambda params: regression_rows(18), max_steps=8)
        return CheckpointStore(tmp_path / folder).load(tmp_path / folder / "checkpoint-8").model

    whole = train("whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-0", tmp_path / "killed" / "checkpoint-0")
    killed = train("killed")
    assert all(torch.equal(value, killed[name]) for name, value in whole.items())


ORDERS = {
    "numpy": lambda num: np.random.permutation(num).tolist(),
    "torch": lambda num: torch.randperm(num).tolist(),
    "python": lambda num: random.sample(range(num), num),
}


class Epochs:
    """Batches in an order that is drawn anew each epoch from the random state of the process, each slow to draw."""

    NUM_BATCHES = 20

    def __init__(self, drawn: list[int], library: str) -> None:
        self._drawn, self._library = drawn, library
        self._batches = [batch for batch in regression_rows(4 * self.NUM_BATCHES).tensors[0].split(4)]
        self._order: list[int] = []

    def __iter__(self):
        while True:
            if not self._order:
                self._order = ORDERS[self._library](self.NUM_BATCHES)
            time.sleep(0.001)
            x = self._batches[self._order.pop(0)]
            self._drawn.append(1)
            yield x, 3 * x + 1

    def state_dict(self):
        return {"order": list(self._order)}

    def load_state_dict(self, state):
        self._order = list(state["order"])


@pytest.mark.parametrize(("library", "stops_at"), [
    ("numpy", 0), ("numpy", 19), ("numpy", 20), ("numpy", 21), ("torch", 20), ("python", 20)])
def test_fault_01_random_state_is_that_of_the_step_though_the_next_epoch_was_drawn_ahead(tmp_path, library, stops_at):
    drawn: list[int] = []

    class WaitForDrawnAhead(tpuspec.SessionRunHook):
        """Lets the input's thread draw beyond the end of the epoch before the save of step 20."""

        def after_run(self, context):
            if context.step == 18:
                deadline = time.monotonic() + 10
                while len(drawn) < 21 and time.monotonic() < deadline:
                    time.sleep(0.001)
                assert len(drawn) >= 21, "the input's thread drew nothing ahead"

    def train(folder, max_steps):
        drawn.clear()
        _trainer(tmp_path / folder, save_checkpoints_steps=1, keep_checkpoint_max=None, iterations_per_loop=1,
                 prefetch_batches=4).train(
            lambda params: Epochs(drawn, library), hooks=[WaitForDrawnAhead()], max_steps=max_steps)

    np.random.seed(5)
    random.seed(5)
    train("whole", 24)
    state = CheckpointStore(tmp_path / "whole").load(tmp_path / "whole" / "checkpoint-24")
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{stops_at}", tmp_path / "killed" / f"checkpoint-{stops_at}")
    train("killed", 24)
    resumed = CheckpointStore(tmp_path / "killed").load(tmp_path / "killed" / "checkpoint-24")
    for name, value in state.model.items():
        assert torch.equal(value, resumed.model[name]), name


def test_a_second_train_of_the_same_trainer_is_bit_equal_too(tmp_path):
    whole = _trainer(tmp_path / "whole").train(lambda params: regression_rows(18), max_steps=9)
    parts = _trainer(tmp_path / "parts")
    for steps in (2, 3, 4):
        parts.train(lambda params: regression_rows(18), steps=steps)
    for key, value in _values(whole).items():
        np.testing.assert_array_equal(value, _values(parts)[key], err_msg=key)


def _generator(params):
    while True:
        yield regression_rows(4).tensors


def test_fault_21_an_input_that_cannot_go_on_is_refused_unless_the_user_allows_it(tmp_path):
    _trainer(tmp_path).train(_generator, max_steps=2)
    with pytest.raises(CheckpointError, match=r"cannot be resumed exactly: input_fn returns an iterable .*Return a Data"
                                              r"set or a list.*allow_inexact_resume=True"):
        _trainer(tmp_path).train(_generator, max_steps=4)
    assert _trainer(tmp_path, allow_inexact_resume=True).train(_generator, max_steps=4).global_step() == 4


@pytest.mark.parametrize(("later", "why"), [
    (lambda params: regression_rows(20), "the checkpoint's Dataset had 18 rows, and this one has 20"),
    (lambda params: [regression_rows(4).tensors], "the checkpoint's input is of kind 'dataset', .* returns 'list'"),
])
def test_fault_21_another_input_is_refused(tmp_path, later, why):
    _trainer(tmp_path).train(lambda params: regression_rows(18), max_steps=2)
    with pytest.raises(CheckpointError, match=why):
        _trainer(tmp_path).train(later, max_steps=4)


def test_an_input_that_was_read_to_its_end_is_read_again(tmp_path):
    def two(params):
        for _ in range(2):
            yield regression_rows(4).tensors

    _trainer(tmp_path).train(two, max_steps=10)
    assert _trainer(tmp_path).train(two, max_steps=10).global_step() == 4


def test_a_list_that_was_read_to_its_last_batch_is_read_again(tmp_path):
    for steps in (3, 6):
        trainer = _trainer(tmp_path).train(lambda params: [regression_rows(4).tensors] * 3, max_steps=steps)
        assert trainer.global_step() == steps


def test_fault_18_another_batch_size_goes_on_behind_the_rows_that_were_read(tmp_path):
    seen = []

    class Rows(NoisyRows):
        def __getitem__(self, i):
            seen.append(i)
            return self._rows[i]

    _trainer(tmp_path, batch_size=4).train(lambda params: Rows(), max_steps=2)
    first = seen[:8]
    seen.clear()
    _trainer(tmp_path, batch_size=2).train(lambda params: Rows(), max_steps=5)
    assert not set(first) & set(seen[:6])


def test_fault_14_when_all_checkpoints_are_damaged_training_does_not_begin_anew(tmp_path):
    _trainer(tmp_path).train(lambda params: regression_rows(18), max_steps=2)
    for folder in tmp_path.glob("checkpoint-*"):
        (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="All checkpoints in .* are damaged .*would bury them"):
        _trainer(tmp_path).train(lambda params: regression_rows(18), max_steps=4)
