"""Rows TAE-01 .. TAE-09, TAE-11 and TAE-12 of the conformance list: train_and_evaluate and exporters."""

from __future__ import annotations

import dataclasses
import math
import os

import pytest
import torch

import tpuspec
from tests.models import input_fn, make_config, make_trainer, serving_input_fn
from tpuspec import (
    BestExporter,
    CheckpointSaverListener,
    EvalSpec,
    Exporter,
    FinalExporter,
    LatestExporter,
    SessionRunHook,
    TrainSpec,
    train_and_evaluate,
)
from tpuspec.export import load
from tpuspec.loops.export_folder import exports_in
from tpuspec.schedule.exporters import compare_metric
from tpuspec.schedule.train_and_evaluate import EvalStatus, Evaluations, evaluate_continuously
from tpuspec.testing.clock import ManualClock


class Recorder(Exporter):
    """Notes each call, and exports nothing."""

    name = "recorder"

    def __init__(self):
        self.calls = []

    def export(self, trainer, export_path, checkpoint_path, eval_result, is_the_final_export):
        self.calls.append((export_path, checkpoint_path, eval_result["global_step"], is_the_final_export))
        return f"exported {eval_result['global_step']}"

    @property
    def steps(self):
        return [step for _, _, step, _ in self.calls]

    @property
    def finals(self):
        return [final for *_, final in self.calls]


def native(tmp_path, **config):
    return make_trainer(tmp_path, use_tpu=False, config=make_config(**{"save_checkpoints_steps": 10, **config}))


def specs(max_steps=None, exporters=None, throttle_secs=0, **arguments):
    return TrainSpec(input_fn, max_steps), EvalSpec(
        input_fn, steps=1, exporters=exporters, throttle_secs=throttle_secs, **arguments)


@pytest.mark.parametrize(("arguments", "kind", "says"), [
    ({"input_fn": 1}, TypeError, "`input_fn` must be callable"),
    ({"max_steps": 0}, ValueError, "Must specify max_steps > 0, given: 0"),
    ({"max_steps": -1}, ValueError, "Must specify max_steps > 0"),
    ({"max_steps": "3"}, TypeError, "max_steps must be int; got '3'"),
    ({"max_steps": 2.5}, TypeError, "max_steps must be int; got 2.5"),
    ({"max_steps": True}, TypeError, "max_steps must be int; got True"),
    ({"input_fn": lambda batch: None}, ValueError, "does not include params argument"),
    ({"hooks": [object()]}, TypeError, "must be a SessionRunHook"),
    ({"saving_listeners": [object()]}, TypeError, "must be a list of CheckpointSaverListener"),
])
def test_tae_01_a_train_spec_of_something_else_is_refused(arguments, kind, says):
    with pytest.raises(kind, match=says):
        TrainSpec(**{"input_fn": input_fn, **arguments})


def test_tae_01_a_train_spec_has_defaults_and_tuples():
    assert dataclasses.astuple(TrainSpec(input_fn)) == (input_fn, None, (), ())
    spec = TrainSpec(input_fn, 3, [SessionRunHook()], [CheckpointSaverListener()])
    assert isinstance(spec.hooks, tuple) and isinstance(spec.saving_listeners, tuple)


class Named(Recorder):
    def __init__(self, name):
        super().__init__()
        self.name = name


@pytest.mark.parametrize(("arguments", "kind", "says"), [
    ({"input_fn": 1}, TypeError, "`input_fn` must be callable"),
    ({"steps": 0}, ValueError, "Must specify steps > 0"),
    ({"steps": 1.5}, TypeError, "steps must be int; got 1.5"),
    ({"steps": math.nan}, TypeError, "steps must be int; got nan"),
    ({"input_fn": lambda batch: None}, ValueError, "does not include params argument"),
    ({"name": 3}, TypeError, "name must be string"),
    ({"name": "../x"}, ValueError, "EvalSpec name must be 1 to 100 letters"),
    ({"hooks": [object()]}, TypeError, "must be a SessionRunHook"),
    ({"start_delay_secs": -1}, ValueError, "Must specify start_delay_secs >= 0"),
    ({"throttle_secs": -1}, ValueError, "Must specify throttle_secs >= 0"),
    ({"start_delay_secs": math.nan}, ValueError, "Must specify start_delay_secs >= 0, a finite number"),
    ({"throttle_secs": math.inf}, ValueError, "Must specify throttle_secs >= 0, a finite number"),
    ({"throttle_secs": "3"}, TypeError, "throttle_secs must be a number of seconds; got '3'"),
    ({"throttle_secs": True}, TypeError, "throttle_secs must be a number of seconds; got True"),
    ({"exporters": object()}, TypeError, "`exporters` must be an Exporter, an iterable of Exporter, or `None`"),
    ({"exporters": [Recorder(), object()]}, TypeError, "`exporters` must be an Exporter"),
    ({"exporters": Named(None)}, ValueError, "must have a name"),
    ({"exporters": Named("")}, ValueError, "must have a name"),
    ({"exporters": Named(1)}, ValueError, "must have a name that is a str"),
    ({"exporters": Named("../x")}, ValueError, "the name of an Exporter must be 1 to 100 letters"),
    ({"exporters": [Named("a"), Named("b"), Named("a")]}, ValueError, "two are called 'a'"),
])
def test_tae_02_an_eval_spec_of_something_else_is_refused(arguments, kind, says):
    with pytest.raises(kind, match=says):
        EvalSpec(**{"input_fn": input_fn, **arguments})


def test_tae_02_an_eval_spec_has_defaults_and_tuples():
    spec = EvalSpec(input_fn)
    assert (spec.steps, spec.name, spec.hooks, spec.exporters) == (None, None, (), ())
    assert (spec.start_delay_secs, spec.throttle_secs) == (120, 600)
    one = Recorder()
    assert EvalSpec(input_fn, exporters=one).exporters == (one,)
    assert EvalSpec(input_fn, steps=100).steps == 100


def test_tae_03_the_eval_spec_is_checked_first_then_the_trainer_then_the_train_spec(tmp_path):
    _, eval_spec = specs(1)
    with pytest.raises(TypeError, match="`eval_spec` must have type tpuspec.EvalSpec; got str"):
        train_and_evaluate("x", "x", "x")
    with pytest.raises(TypeError, match="`trainer` must have type tpuspec.Trainer; got str"):
        train_and_evaluate("x", "x", eval_spec)
    with pytest.raises(TypeError, match="`train_spec` must have type tpuspec.TrainSpec; got str"):
        train_and_evaluate(native(tmp_path), "x", eval_spec)


def test_tae_03_there_is_one_evaluator(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="there can only be one `evaluator` task"):
        make_config(task_type="evaluator")


@pytest.mark.parametrize(("max_steps", "evaluated"), [(22, [10, 20, 22]), (12, [10, 12])])
def test_tae_04_all_checkpoints_but_the_first_are_evaluated_and_exported(tmp_path, max_steps, evaluated):
    exporter, trains = Recorder(), []

    class Begins(SessionRunHook):
        def begin(self, context):
            trains.append(context.step)

    trainer = native(tmp_path)
    train_and_evaluate(trainer, TrainSpec(input_fn, max_steps, hooks=[Begins()]), specs(exporters=exporter)[1])
    assert exporter.steps == evaluated
    assert exporter.finals == [False] * (len(evaluated) - 1) + [True]
    assert trains == [0]


def test_tae_04_a_resumed_run_evaluates_what_it_saves(tmp_path):
    native(tmp_path).train(input_fn, max_steps=10)
    exporter = Recorder()
    train_and_evaluate(native(tmp_path), *specs(20, exporter))
    assert exporter.steps == [20]


def test_tae_05_throttled_evaluations_are_left_out_but_for_the_last(tmp_path):
    exporter = Recorder()
    train_and_evaluate(native(tmp_path), *specs(22, exporter, throttle_secs=600))
    assert (exporter.steps, exporter.finals) == ([10, 22], [False, True])


def test_tae_06_an_exporter_gets_its_folder_the_exact_checkpoint_and_whether_it_is_the_last(tmp_path):
    exporter, evaluated = Recorder(), []
    trainer = native(tmp_path)
    evaluate = trainer.evaluate

    def evaluating(*args, **kwargs):
        evaluated.append((args, kwargs))
        return evaluate(*args, **kwargs)

    trainer.evaluate = evaluating
    hook = SessionRunHook()
    _, eval_spec = specs(exporters=exporter, name="mine", hooks=[hook])
    train_and_evaluate(trainer, TrainSpec(lambda params: [(torch.ones(2, 1), torch.zeros(2, 1))] * 12), eval_spec)
    assert exporter.calls == [
        (str(tmp_path / "export" / "recorder"), str(tmp_path / f"checkpoint-{step}"), step, False) for step in (10, 12)]
    assert evaluated == [((input_fn,), {"steps": 1, "name": "mine", "hooks": (hook,), "checkpoint_path": str(
        tmp_path / f"checkpoint-{step}")}) for step in (10, 12)]


def test_tae_07_the_last_metrics_and_exports_are_returned(tmp_path):
    trainer = native(tmp_path)
    metrics, exports = train_and_evaluate(trainer, *specs(12, [Recorder(), Named("silent")]))
    assert (metrics["global_step"], exports) == (12, ["exported 12", "exported 12"])
    assert train_and_evaluate(trainer, *specs(12, Recorder())) == (None, None), "training was complete"


def test_tae_08_checkpoints_must_be_on_and_there(tmp_path):
    off = make_trainer(tmp_path, use_tpu=False,
                       config=make_config(save_checkpoints_steps=None, save_checkpoints_secs=None))
    with pytest.raises(ValueError, match="There should be a CheckpointSaverHook"):
        train_and_evaluate(off, *specs(1))
    trainer = native(tmp_path)
    trainer.latest_checkpoint = lambda: None
    with pytest.raises(RuntimeError, match="There was no new checkpoint after the training"):
        train_and_evaluate(trainer, *specs(1))


@pytest.mark.parametrize(("result", "kind", "says"), [
    ({}, ValueError, "returned no metrics"), ("x", TypeError, "must return a dict of metrics; got str"),
    ({"loss": 1}, ValueError, "must return 'global_step'")])
def test_tae_08_an_evaluation_must_give_metrics_with_global_step(tmp_path, result, kind, says):
    trainer = native(tmp_path)
    trainer.evaluate = lambda *args, **kwargs: result
    with pytest.raises(kind, match=says):
        train_and_evaluate(trainer, *specs(1))


class Evaluator:
    """Answers evaluate() with the steps of a list."""

    is_chief = False

    def __init__(self, steps):
        self.model_dir, self.config = "nowhere", make_config(task_type="evaluator")
        self._steps = iter(steps)
        self.evaluated = []

    def evaluate(self, input_fn, *, checkpoint_path, **arguments):
        self.evaluated.append(checkpoint_path)
        return {"global_step": next(self._steps), "loss": 1.0}


def test_tae_09_an_evaluator_skips_what_is_missing_or_known_and_waits_the_rest_of_its_distance():
    exporter, clock, slept = Recorder(), ManualClock(), []
    eval_spec = EvalSpec(input_fn, exporters=exporter, start_delay_secs=34, throttle_secs=123)
    trainer = Evaluator([1, 5])
    evaluations = Evaluations(trainer, eval_spec, max_steps=5)
    paths = iter([None, "", "same", "same", "path_2"])

    def latest():
        clock.advance(12)
        return next(paths)

    evaluate_continuously(evaluations, eval_spec, latest, sleep=slept.append, clock=clock)
    assert trainer.evaluated == ["same", "path_2"]
    assert slept == [34, 111, 111, 111, 111]
    assert (exporter.steps, exporter.finals) == ([1, 5], [False, True])


def test_tae_09_each_look_has_a_status():
    evaluations = Evaluations(Evaluator([1, 5]), EvalSpec(input_fn), max_steps=5)
    assert [evaluations.evaluate(path) for path in (None, "", "same", "same", "path_2")] == [
        EvalStatus.MISSING_CHECKPOINT, EvalStatus.MISSING_CHECKPOINT, EvalStatus.EVALUATED,
        EvalStatus.NO_NEW_CHECKPOINT, EvalStatus.EVALUATED]


def test_tae_09_an_evaluator_process_evaluates_and_exports_what_another_one_saved(tmp_path):
    native(tmp_path).train(input_fn, max_steps=12)
    evaluator = native(tmp_path, task_type="evaluator")
    metrics, exports = train_and_evaluate(evaluator, *specs(12, LatestExporter("latest", serving_input_fn),
                                                            start_delay_secs=0))
    assert metrics["global_step"] == 12
    assert load(exports[0]).global_step == 12


@pytest.fixture
def trained(tmp_path):
    return native(tmp_path / "run").train(input_fn, max_steps=1)


def offer(exporter, trainer, tmp_path, **metrics):
    """Whether the exporter exports a result."""
    path = exporter.export(trainer, str(tmp_path / "out"), trainer.latest_checkpoint(), {"global_step": 1, **metrics},
                           False)
    assert path is None or load(path).metrics == pytest.approx({"global_step": 1, **metrics}, nan_ok=True)
    return path is not None


def test_tae_11_the_first_result_is_exported_and_then_only_smaller_losses(tmp_path, trained):
    exporter = BestExporter("best", serving_input_fn)
    offers = [offer(exporter, trained, tmp_path, loss=loss) for loss in (0.5, 0.6, 0.5, 0.4)]
    assert offers == [True, False, False, True]


def test_tae_11_better_the_best_result_is_known_behind_a_restart(tmp_path, trained):
    """TPUEstimator's first export of a new instance always wins, and forgets a better one (DESIGN: better, 5)."""
    assert offer(BestExporter("best", serving_input_fn), trained, tmp_path, loss=10.0)
    again = BestExporter("best", serving_input_fn)
    assert [offer(again, trained, tmp_path, loss=loss) for loss in (100.0, 9.0, 20.0)] == [False, True, False]


def test_tae_11_nan_is_never_better_and_does_not_stay_the_best(tmp_path, trained):
    exporter = BestExporter("best", serving_input_fn)
    offers = [offer(exporter, trained, tmp_path, loss=loss) for loss in (math.nan, math.nan, 7.0, math.nan)]
    assert offers == [True, False, True, False]


def test_tae_11_any_metric_can_be_compared(tmp_path, trained):
    exporter = BestExporter("best", serving_input_fn, compare_fn=compare_metric("accuracy", higher_is_better=True))
    assert [offer(exporter, trained, tmp_path, accuracy=value) for value in (0.5, 0.4, 0.6)] == [True, False, True]
    with pytest.raises(ValueError, match=r"compared by 'accuracy', which the evaluation does not give"):
        offer(exporter, trained, tmp_path, loss=1.0)
    with pytest.raises(ValueError, match="compare_fn must take best_eval_result and current_eval_result"):
        BestExporter("best", serving_input_fn, compare_fn=lambda a, b: True)
    with pytest.raises(TypeError, match="compare_fn must be a function of best_eval_result and .*; got NoneType"):
        BestExporter("best", serving_input_fn, compare_fn=None)


def test_tae_12_the_latest_exporter_exports_each_time_and_keeps_the_newest(tmp_path, trained):
    exporter = LatestExporter("latest", serving_input_fn, exports_to_keep=2)
    (tmp_path / "out" / "123").mkdir(parents=True)
    (tmp_path / "out" / "notanexport").mkdir()
    paths = [exporter.export(trained, f"{tmp_path}/out/", trained.latest_checkpoint(), {"global_step": 1}, False)
             for _ in range(3)]
    assert [os.path.basename(path) for path in paths[1:]] == [path.name for path in exports_in(tmp_path / "out")]
    assert {"123", "notanexport"} <= set(os.listdir(tmp_path / "out"))
    assert len(os.listdir(tmp_path / "out")) == 4


def test_tae_12_the_final_exporter_exports_the_last_one_only(tmp_path, trained):
    exporter = FinalExporter("final", serving_input_fn)
    assert not offer(exporter, trained, tmp_path)
    path = exporter.export(trained, str(tmp_path / "out"), trained.latest_checkpoint(), {"global_step": 1}, True)
    assert load(path).global_step == 1


@pytest.mark.parametrize("kind", [LatestExporter, BestExporter])
def test_tae_12_exports_to_keep_must_be_positive_or_none(kind):
    with pytest.raises(ValueError, match="positive number"):
        kind("name", serving_input_fn, exports_to_keep=0)
    for value in ("a", 2.5, True):
        with pytest.raises(TypeError, match=f"exports_to_keep must be int; got {value!r}"):
            kind("name", serving_input_fn, exports_to_keep=value)
    assert kind("name", serving_input_fn, exports_to_keep=None).name == "name"


@pytest.mark.parametrize("kind", [LatestExporter, FinalExporter, BestExporter])
@pytest.mark.parametrize(("receive", "error", "says"), [
    (None, ValueError, "serving_input_fn is None. Pass a function that returns a ServingInputReceiver"),
    ("x", TypeError, "serving_input_fn must be a function that returns a ServingInputReceiver; got str"),
    (lambda features: None, ValueError, r"may take params, and nothing else; it takes \['features'\]")])
def test_an_exporter_with_another_serving_input_fn_is_refused_when_it_is_made(kind, receive, error, says):
    with pytest.raises(error, match=says):
        kind("name", receive)


@pytest.mark.parametrize("kind", [LatestExporter, FinalExporter, BestExporter])
@pytest.mark.parametrize(("assets", "error", "says"), [
    ({"../x": "file"}, ValueError, r"maps places below assets.extra, .*; got '../x'"),
    ({"x": 3}, TypeError, r"assets_extra\['x'\] must be the path of a file; got 3"),
    (["file"], TypeError, "assets_extra must be a dict of places below assets.extra to files; got list")])
def test_an_exporter_with_other_assets_is_refused_when_it_is_made(kind, assets, error, says):
    with pytest.raises(error, match=says):
        kind("name", serving_input_fn, assets_extra=assets)


def test_exporters_at_an_address_are_refused_before_training(tmp_path):
    trainer = make_trainer("memory://bucket/run", use_tpu=False)
    with pytest.raises(ValueError, match="exporters write to model_dir/export, which must be a folder of this machine"):
        tpuspec.train_and_evaluate(trainer, *specs(1, Recorder()))


def test_a_final_exporter_without_an_end_of_training_is_refused_before_training(tmp_path):
    trainer = native(tmp_path)
    with pytest.raises(ValueError, match="the FinalExporter 'final' exports at max_steps, and .* Give max_steps"):
        tpuspec.train_and_evaluate(trainer, *specs(None, [Recorder(), FinalExporter("final", serving_input_fn)]))
    assert trainer.latest_checkpoint() is None
