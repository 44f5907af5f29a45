"""What only host functions touch neither stops capture nor starts it anew; what model_fn reads too does."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.tracer.test_capture import BATCH, batches, kind, rows
from tpuspec import CrossShardOptimizer, ModeKeys, RunConfig, TPUConfig, TPUEstimatorSpec, Trainer
from tpuspec.tracer.program import Program

LOSSES: list[float] = []
ROWS: list[int] = []


def spec_of(features, labels, mode, model, optimizer, host_call, metric_fn):
    losses = F.cross_entropy(model(features), labels, reduction="none")
    if mode == ModeKeys.EVAL:
        return TPUEstimatorSpec(mode, loss=losses, eval_metrics=(metric_fn, [losses]))
    return TPUEstimatorSpec(mode, loss=losses.mean(), host_call=(host_call, [losses.mean().reshape(1)]),
                            train_op=CrossShardOptimizer(optimizer).minimize(losses.mean()))


def note(loss):
    LOSSES.extend(loss.tolist())


def count_rows(losses):
    ROWS.append(len(losses))
    return {"rows": torch.tensor(float(sum(ROWS)))}


def by_functions(features, labels, mode, params, model, optimizer):
    return spec_of(features, labels, mode, model, optimizer, note, count_rows)


def by_functions_inside(features, labels, mode, params, model, optimizer):
    def counting(losses):
        return count_rows(losses)

    return spec_of(features, labels, mode, model, optimizer, lambda loss: LOSSES.extend(loss.tolist()), counting)


class Notes:
    """Host functions as methods, which reach what they remember by another method."""

    def __init__(self):
        self.kept, self.num_kept = LOSSES, 0

    def host_call(self, loss):
        self.keep(loss.tolist())

    def metric_fn(self, losses):
        self.num_kept += 1
        return count_rows(losses)

    def keep(self, losses):
        self.kept.extend(losses)
        self.num_kept += len(losses)


NOTES = Notes()


def by_methods(features, labels, mode, params, model, optimizer):
    return spec_of(features, labels, mode, model, optimizer, NOTES.host_call, NOTES.metric_fn)


class Called(Notes):
    def __call__(self, loss):
        self.host_call(loss)


CALLED = Called()


def by_a_callable_object(features, labels, mode, params, model, optimizer):
    return spec_of(features, labels, mode, model, optimizer, CALLED, count_rows)


class Scaled(Notes):
    """A model_fn that reads what its host function reads too."""

    def __init__(self):
        super().__init__()
        self.scale = 1.0

    def model_fn(self, features, labels, mode, params, model, optimizer):
        return spec_of(self.scaled(features), labels, mode, model, optimizer, self.host_call, self.metric_fn)

    def scaled(self, features):
        return features * self.factor

    def host_call(self, loss):
        self.keep([loss.item() / (self.scale + 1)])

    @property
    def factor(self):
        return self.scale


@pytest.fixture
def num_captures(monkeypatch):
    """Returns how many programs were made since it was asked last."""
    made, program = [], Program.of

    def counting(*args):
        made.append(args)
        return program(*args)

    def since():
        num = len(made)
        made.clear()
        return num

    monkeypatch.setattr(Program, "of", counting)
    LOSSES.clear()
    ROWS.clear()
    return since


def make(model_fn, tmp_path):
    return Trainer(model_fn, model=nn.Linear(4, 3), params={}, model_dir=tmp_path, train_batch_size=BATCH,
                   eval_batch_size=BATCH, optimizer=lambda model, params: torch.optim.SGD(model.parameters(), lr=0.1),
                   config=RunConfig(seed=5, show_progress=False, capture="require",
                                    tpu_config=TPUConfig(iterations_per_loop=4)))


def few(params):
    return itertools.islice(batches(rows)(params), 6)


@pytest.mark.parametrize("model_fn", [by_functions, by_functions_inside, by_methods, by_a_callable_object,
                                      Scaled().model_fn],
                         ids=["functions", "functions inside", "methods", "a callable object", "own methods"])
def test_what_host_functions_remember_starts_no_capture(model_fn, num_captures, tmp_path):
    trainer = make(model_fn, tmp_path)
    trainer.train(batches(rows), steps=8)
    assert num_captures() == 1
    trainer.train(batches(rows), steps=8)
    assert num_captures() == 0
    trainer.evaluate(few)
    assert num_captures() == 1
    trainer.train(batches(rows), steps=8)
    for _ in range(2):
        trainer.evaluate(few)
        trainer.train(batches(rows), steps=8)
    assert num_captures() == 0
    assert kind(trainer) == "replay"
    assert (len(LOSSES), len(ROWS)) == (40, 3 * 6 + 1)  # and once on zeros


def test_what_model_fn_reads_too_makes_a_new_capture(num_captures, tmp_path):
    scaled = Scaled()
    trainer = make(scaled.model_fn, tmp_path)
    trainer.train(batches(rows), steps=8)
    num_captures()
    scaled.scale = 0.0
    LOSSES.clear()
    before = trainer._sessions[True].model_state()["weight"]
    trainer.train(batches(rows), steps=8)
    assert num_captures() == 1
    assert torch.equal(trainer._sessions[True].model_state()["weight"], before)  # no features, no gradient
    assert len(LOSSES) == 8
