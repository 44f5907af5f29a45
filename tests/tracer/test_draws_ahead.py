"""A few batches are made ready at once where steps are replayed; nobody finds the input further than without that."""

from __future__ import annotations

import pytest
from torch import nn

from tests.tracer.test_capture import assert_same, batches, classify, rows, run, sgd
from tpuspec import SessionRunHook
from tpuspec.loops.session import Session
from tpuspec.loops.train import TrainLoop
from tpuspec.tracer.capture import CapturedStep

NOT_ON_A_THREAD = {"prefetch_batches": 0}
STEPS = 40
INPUT = batches(rows)


class Counted:
    """Counts the batches that were drawn."""

    def __init__(self, input_fn, num_good=None):
        self.num_drawn, self._input_fn, self._num_good = 0, input_fn, num_good

    def __call__(self, params):
        for batch in self._input_fn(params):
            if self.num_drawn == self._num_good:
                raise OSError("no more rows")
            self.num_drawn += 1
            yield batch


@pytest.fixture
def quick(monkeypatch):
    """Lets making batches ready take its time, as a busy machine may; notes how many were ready at once."""
    monkeypatch.setattr("tpuspec.loops.train._READY_SECONDS", 60.0)
    most: list[int] = []
    draw = TrainLoop._draw
    monkeypatch.setattr(TrainLoop, "_draw", lambda loop, num_left: (draw(loop, num_left), most.append(
        len(loop._ready)))[0])
    return most


def test_at_boundaries_and_traces_no_batch_was_drawn_that_no_step_has(tmp_path, quick, monkeypatch):
    counted, seen = Counted(INPUT), []

    class Look(SessionRunHook):
        def after_run(self, context):
            seen.append((context.step, counted.num_drawn))

    trace, traced = CapturedStep._trace, []
    count, num_updates = Session.count_update, [0]

    def note(step, *args):
        traced.append((num_updates[0], counted.num_drawn))
        return trace(step, *args)

    def count_one(session):
        num_updates[0] += 1
        count(session)

    monkeypatch.setattr(CapturedStep, "_trace", note)
    monkeypatch.setattr(Session, "count_update", count_one)
    run("require", classify, nn.Linear(4, 3), sgd, counted, tmp_path, steps=STEPS, loop=20,
        hooks=[Look()], config=NOT_ON_A_THREAD)
    assert seen == [(20, 20), (40, 40)]
    assert max(quick) > 1, "several were ready at once"
    assert len(traced) > 4, "also audits, and the one after the hook"
    assert all(num_drawn == num_updates + 1 for num_updates, num_drawn in traced), traced


def test_losses_and_weights_are_those_of_single_draws(tmp_path, quick, monkeypatch):
    ahead = run("require", classify, nn.Linear(4, 3), sgd, INPUT, tmp_path, config=NOT_ON_A_THREAD)
    assert max(quick) > 1
    monkeypatch.setattr("tpuspec.loops.train._MOST_READY", 1)
    quick.clear()
    assert_same(ahead, run("require", classify, nn.Linear(4, 3), sgd, INPUT, tmp_path, config=NOT_ON_A_THREAD))
    assert max(quick) == 0


def test_an_error_of_the_input_comes_after_the_steps_before_it(tmp_path, quick):
    done: list[int] = []

    class Count(SessionRunHook):
        def end(self, context):
            done.append(context.step)

    with pytest.raises(OSError, match="no more rows"):
        run("require", classify, nn.Linear(4, 3), sgd, Counted(INPUT, 27), tmp_path, steps=STEPS, loop=STEPS,
            hooks=[Count()], config=NOT_ON_A_THREAD)
    assert max(quick) > 1
    assert len(done) == 1
