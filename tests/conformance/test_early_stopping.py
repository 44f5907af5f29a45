"""Rows TAE-13 .. TAE-15 of the conformance list: the history of evaluations, and early stopping."""

from __future__ import annotations

import json
import math
import operator
from types import SimpleNamespace

import pytest

import tpuspec
from tests.models import input_fn, make_config, make_trainer
from tpuspec import EvalSpec, TrainSpec, early_stopping
from tpuspec.schedule.early_stopping import StopHook, has_stalled
from tpuspec.schedule.history import read_eval_metrics
from tpuspec.spec.hooks import HookContext
from tpuspec.summary.jsonl import JsonlWriter
from tpuspec.testing.clock import ManualClock

POINTS = [(1000, 0.8, 0.5), (2000, 0.7, 0.6), (3000, 0.4, 0.7), (3500, 0.41, 0.68)]


@pytest.fixture
def trainer(tmp_path):
    """A Trainer whose model_dir has the points."""
    made = make_trainer(tmp_path, use_tpu=False)
    writer = JsonlWriter(tmp_path / "eval")
    for step, loss, accuracy in POINTS:
        writer.scalar("loss", loss, step)
        writer.scalar("accuracy", accuracy, step)
        writer.text("checkpoint_path", "somewhere", step)
    writer.close()
    return made


def test_tae_13_the_history_has_each_step_with_its_metrics_in_order(tmp_path, trainer):
    assert list(read_eval_metrics(tmp_path / "eval").items()) == [
        (step, {"loss": loss, "accuracy": accuracy}) for step, loss, accuracy in POINTS]


def test_tae_13_without_evaluations_it_is_empty(tmp_path):
    assert read_eval_metrics(tmp_path) == read_eval_metrics(tmp_path / "nowhere") == {}


def test_tae_13_a_torn_record_is_passed_over(tmp_path):
    lines = [json.dumps({"step": step, "name": "loss", "value": 0.5, "wall_time": 0}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text(f"{lines[0]}\n{lines[1][:20]}\n{lines[2][:9]}\0\n7\n")
    assert read_eval_metrics(tmp_path) == {1: {"loss": 0.5}}


def test_tae_13_evaluations_of_a_trainer_are_its_history(tmp_path):
    made = make_trainer(tmp_path, use_tpu=False).train(input_fn, max_steps=2)
    result = made.evaluate(input_fn)
    assert read_eval_metrics(tmp_path / "eval") == {2: {"loss": pytest.approx(result["loss"])}}


def stops(hook) -> bool:
    context = HookContext(mode="train", step=4000)
    hook.after_run(context)
    return context.stop_requested


@pytest.mark.parametrize(("make", "arguments", "expected"), [
    ("stop_if_higher_hook", ("accuracy", 0.6), True), ("stop_if_higher_hook", ("accuracy", 0.8), False),
    ("stop_if_higher_hook", ("accuracy", 0.7), False),
    ("stop_if_lower_hook", ("loss", 0.5), True), ("stop_if_lower_hook", ("loss", 0.3), False),
    ("stop_if_lower_hook", ("loss", 0.4), False),
    ("stop_if_no_increase_hook", ("accuracy", 500), True), ("stop_if_no_increase_hook", ("accuracy", 1500), False),
    ("stop_if_no_decrease_hook", ("loss", 500), True), ("stop_if_no_decrease_hook", ("loss", 1500), False),
])
def test_tae_14_a_hook_stops_by_any_point_of_the_history(trainer, make, arguments, expected):
    assert stops(getattr(early_stopping, make)(trainer, *arguments)) == expected
    assert not stops(getattr(early_stopping, make)(trainer, *arguments, min_steps=4000))


def test_tae_14_a_point_without_the_metric_is_a_key_error(trainer):
    with pytest.raises(KeyError, match="recall"):
        stops(early_stopping.stop_if_higher_hook(trainer, "recall", 0.5))


@pytest.mark.parametrize(("losses", "expected"), [
    ((math.nan, 5, 4, 3), False), ((math.nan, 5, 4, 4), True), ((5, math.nan, 4, 3), True),
    ((math.nan, math.nan, math.nan, math.nan), True), ((math.nan, 5, math.nan, 3), True)])
def test_tae_14_better_a_first_evaluation_that_is_nan_does_not_stay_the_best(losses, expected):
    history = {100 * i: {"loss": float(loss)} for i, loss in enumerate(losses)}
    assert has_stalled(history, "loss", 100, 0, operator.lt) == expected
    rising = {step: {"loss": -metrics["loss"]} for step, metrics in history.items()}
    assert has_stalled(rising, "loss", 100, 0, operator.gt) == expected


def test_tae_14_hooks_can_be_combined_and_end_a_real_training(tmp_path):
    made = make_trainer(tmp_path, use_tpu=False, config=make_config(save_checkpoints_steps=2))
    hooks = [early_stopping.stop_if_higher_hook(made, "loss", 1e9, run_every_secs=0),
             early_stopping.stop_if_lower_hook(made, "loss", 1e9, run_every_secs=None, run_every_steps=1)]
    metrics, _ = tpuspec.train_and_evaluate(
        made, TrainSpec(input_fn, 100, hooks=hooks), EvalSpec(input_fn, throttle_secs=0))
    assert metrics["global_step"] == 2


@pytest.mark.parametrize("use_tpu", [True, False])
def test_tae_14_better_a_run_that_is_started_again_after_its_early_stop_does_not_train_on(use_tpu, tmp_path):
    def run():
        made = make_trainer(tmp_path, use_tpu=use_tpu, config=make_config(save_checkpoints_steps=2))
        hooks = [early_stopping.stop_if_lower_hook(made, "loss", 1e9, run_every_secs=0)]
        results = tpuspec.train_and_evaluate(
            made, TrainSpec(input_fn, 100, hooks=hooks), EvalSpec(input_fn, throttle_secs=0))
        return made.global_step(), results

    stopped_at, results = run()
    assert results[0]["global_step"] == stopped_at < 100
    assert run() == (stopped_at, (None, None))


def test_tae_15_something_else_than_a_trainer_is_refused():
    with pytest.raises(TypeError, match="`trainer` must have type tpuspec.Trainer; got str"):
        early_stopping.make_early_stopping_hook("x", lambda: True)
    with pytest.raises(TypeError, match="must have type tpuspec.Trainer; got SimpleNamespace"):
        early_stopping.stop_if_higher_hook(SimpleNamespace(model_dir="x"), "loss", 1)
    with pytest.raises(TypeError, match="`should_stop_fn` must be callable"):
        early_stopping.make_early_stopping_hook(SimpleNamespace(model_dir="x", train=print), 3)


@pytest.mark.parametrize("distance", [(60, 100), (None, None)])
def test_tae_15_seconds_or_steps_are_given_not_both(trainer, distance):
    with pytest.raises(ValueError, match="Only one of `run_every_secs` and `run_every_steps` must be set"):
        early_stopping.make_early_stopping_hook(trainer, lambda: True, *distance)


@pytest.mark.parametrize(("make", "arguments", "kind", "says"), [
    ("stop_if_higher_hook", {"threshold": "1"}, TypeError, "threshold must be a number; got '1'"),
    ("stop_if_lower_hook", {"threshold": math.nan}, TypeError, "threshold must be a number; got nan"),
    ("stop_if_lower_hook", {"threshold": 1, "min_steps": "5"}, TypeError, "min_steps must be int; got '5'"),
    ("stop_if_no_increase_hook", {"max_steps_without_increase": "5"}, TypeError, "must be int; got '5'"),
    ("stop_if_no_decrease_hook", {"max_steps_without_decrease": 5, "run_every_secs": "1"}, TypeError,
     "run_every_secs must be a number of seconds; got '1'"),
    ("stop_if_no_decrease_hook", {"max_steps_without_decrease": 5, "run_every_secs": -1}, ValueError,
     "Must specify run_every_secs >= 0"),
    ("stop_if_no_decrease_hook", {"max_steps_without_decrease": 5, "run_every_secs": None, "run_every_steps": 1.5},
     TypeError, "run_every_steps must be int; got 1.5"),
])
def test_tae_15_a_number_that_is_none_is_refused_before_training(trainer, make, arguments, kind, says):
    with pytest.raises(kind, match=says):
        getattr(early_stopping, make)(trainer, "loss", **arguments)


def test_tae_15_the_function_is_asked_at_first_and_then_in_its_distance():
    clock, asked = ManualClock(), []

    def ask(hook, step):
        before = len(asked)
        context = HookContext(mode="train", step=step)
        hook.after_run(context)
        assert not context.stop_requested
        return len(asked) > before

    by_steps = StopHook(lambda: asked.append(1), None, 10, clock)
    assert [ask(by_steps, step) for step in (1, 5, 10, 11, 20, 21)] == [True, False, False, True, False, True]
    by_seconds = StopHook(lambda: asked.append(1), 60, None, clock)
    found = []
    for seconds in (0, 59, 1, 30, 30):
        clock.advance(seconds)
        found.append(ask(by_seconds, 1))
    assert found == [True, False, True, False, True]


def test_tae_15_a_history_at_an_address_is_refused_before_training():
    made = make_trainer("memory://bucket/run", use_tpu=False)
    with pytest.raises(ValueError, match="kept in folders of this machine only"):
        early_stopping.stop_if_lower_hook(made, "loss", 1)
