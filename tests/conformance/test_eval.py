"""Rows EVAL-01 .. EVAL-11 of the conformance list: evaluate()."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric, Metric

from tests.models import StepRecorder, input_fn, make_config, make_spec, make_trainer
from tests.several_replicas import use_fake
from tpuspec import EstimatorSpec, InputPipelineConfig, ModeKeys, TPUConfig

both_paths = pytest.mark.parametrize("use_tpu", [True, False], ids=["xla", "native"])


def with_metrics(**fields):
    def metrics_model_fn(features, labels, mode, params, model, optimizer):
        outputs = model(features)
        made = {name: field(outputs, labels) if mode == ModeKeys.EVAL else None for name, field in fields.items()}
        return make_spec(mode, outputs, labels, optimizer, **{k: v for k, v in made.items() if v is not None})

    return metrics_model_fn


def metrics_of(**values):
    return with_metrics(eval_metrics=lambda outputs, labels: (lambda outputs: dict(values), [outputs]))


def batches(count, size=2):
    return lambda params: [(torch.ones(size, 1), torch.zeros(size, 1))] * count


@pytest.mark.parametrize("steps", [2, 6])
@pytest.mark.parametrize("loop", [1, 4])
def test_eval_01_all_steps_are_one_loop_whatever_iterations_per_loop_is(tmp_path, steps, loop):
    seen = []
    trainer = make_trainer(tmp_path, with_metrics(eval_metrics=lambda outputs, labels: (
        lambda outputs: seen.append(1) or {}, [outputs])),
        config=make_config(tpu_config=TPUConfig(iterations_per_loop=loop)))
    recorder = StepRecorder()
    trainer.evaluate(batches(10), steps=steps, hooks=[recorder])
    assert (recorder.before, recorder.after) == ([0], [steps])
    assert len(seen) - 1 == steps  # and once in the rehearsal


def test_eval_01_without_xla_hooks_fire_at_every_step(tmp_path):
    recorder = StepRecorder()
    make_trainer(tmp_path, use_tpu=False).evaluate(batches(10), steps=5, hooks=[recorder])
    assert (recorder.before, recorder.after) == ([0, 1, 2, 3, 4], [1, 2, 3, 4, 5])


def absolute_error(labels, outputs):
    return {"absolute_error": (labels - outputs).abs().squeeze(1)}


@both_paths
@pytest.mark.parametrize("tensors", [
    None, lambda outputs, labels: [labels, outputs],
    lambda outputs, labels: {"outputs": outputs, "labels": labels}], ids=["absent", "list", "dict"])
def test_eval_02_eval_metrics_may_be_absent_a_list_or_a_dict(tmp_path, use_tpu, tensors):
    fields = {} if tensors is None else {"eval_metrics": lambda o, y: (absolute_error, tensors(o, y))}
    result = make_trainer(tmp_path, with_metrics(**fields), use_tpu=use_tpu).train(input_fn, steps=1).evaluate(input_fn)
    assert set(result) == {"loss", "global_step"} | ({"absolute_error"} if fields else set())
    if fields:
        assert result["absolute_error"] ** 2 == pytest.approx(result["loss"], rel=1e-5)


def plain_spec(features, labels, mode, params, model, optimizer):
    spec = make_spec(mode, model(features), labels, optimizer)
    return spec if mode == ModeKeys.TRAIN else EstimatorSpec(mode, loss=spec.loss)


@pytest.mark.parametrize(("use_tpu", "eval_on_tpu"), [(False, False), (False, True), (True, False), (True, True)])
def test_eval_03_where_an_estimator_spec_may_be_evaluated(tmp_path, use_tpu, eval_on_tpu, caplog):
    with caplog.at_level(logging.WARNING, "tpuspec"):
        trainer = make_trainer(tmp_path, plain_spec, use_tpu=use_tpu, eval_on_tpu=eval_on_tpu)
    trainer.train(input_fn, steps=1)
    if use_tpu and eval_on_tpu:
        with pytest.raises(RuntimeError, match="must have type`?.?TPUEstimatorSpec"):
            trainer.evaluate(input_fn)
    else:
        for _ in range(2):
            assert trainer.evaluate(input_fn)["global_step"] == 1
    assert caplog.text.count("eval_on_tpu ignored because use_tpu is False.") == (not use_tpu and eval_on_tpu), "once"


@pytest.mark.parametrize(("use_tpu", "steps", "error", "message"), [
    (True, 12.3, TypeError, "steps must be int"), (True, -321, ValueError, "must be positive"),
    (False, 0, ValueError, "Must specify steps > 0"), (False, -1, ValueError, "Must specify steps > 0"),
    (False, 12.3, TypeError, "must be int")])
def test_eval_04_steps_that_are_no_positive_int_are_refused(tmp_path, use_tpu, steps, error, message):
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, use_tpu=use_tpu).evaluate(input_fn, steps=steps)


def test_eval_04_hooks_are_checked_before_the_batch_size_and_that_before_steps(tmp_path):
    trainer = make_trainer(tmp_path, eval_batch_size=None)
    with pytest.raises(TypeError, match="must be.*SessionRunHook"):
        trainer.evaluate(input_fn, steps=12.3, hooks=["no hook"])
    with pytest.raises(ValueError, match="eval_batch_size .* cannot be `None`"):
        trainer.evaluate(input_fn, steps=12.3)


@both_paths
def test_eval_04_without_steps_it_runs_to_the_end_of_the_input(tmp_path, use_tpu):
    recorder = StepRecorder()
    make_trainer(tmp_path, use_tpu=use_tpu).evaluate(batches(7), hooks=[recorder])
    assert recorder.after[-1] == 7


@both_paths
def test_eval_05_the_result_tells_the_global_step_and_evaluation_does_not_change_it(tmp_path, use_tpu):
    trainer = make_trainer(tmp_path, use_tpu=use_tpu).train(input_fn, steps=5)
    result = trainer.evaluate(batches(8), steps=6)
    assert result["global_step"] == 5 and isinstance(result["loss"], float)
    assert trainer.global_step() == 5
    assert trainer.get_variable_value("global_step") == 5


def fixed_losses(features, labels, mode, params):
    return make_spec(mode, features, None, None, loss=features.mean())


@both_paths
@pytest.mark.parametrize(("losses", "expected"), [((2, 4, 6, 8, 10), 6.0), ((11, 22), 16.5)])
def test_eval_06_the_loss_is_the_mean_over_steps(tmp_path, use_tpu, losses, expected):
    trainer = make_trainer(tmp_path, fixed_losses, use_tpu=use_tpu, model=None, optimizer=None)
    assert trainer.evaluate(lambda params: [torch.full((2, 1), float(x)) for x in losses])["loss"] == expected


def test_eval_06_better_the_loss_is_the_mean_over_all_replicas(tmp_path, monkeypatch):
    use_fake(monkeypatch, 2)
    trainer = make_trainer(tmp_path, fixed_losses, model=None, optimizer=None)
    assert trainer.evaluate(lambda params: [torch.tensor([[1.0], [4.0]])])["loss"] == 2.5


@both_paths
@pytest.mark.parametrize("name", ["loss", "global_step"])
def test_eval_07_reserved_names_of_metrics_are_a_value_error(tmp_path, use_tpu, name):
    with pytest.raises(ValueError, match=f"Metric with name `{name}` is not allowed, because Estimator already defines "
                                         "a default metric with the same name"):
        make_trainer(tmp_path, metrics_of(**{name: 1.0}), use_tpu=use_tpu).evaluate(input_fn)


class TupleMetric(Metric):
    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, rows):
        self.count += len(rows)

    def compute(self):
        return (torch.tensor(2.0), (self.count, torch.tensor([1, 2]))), {"three": torch.tensor(3.0)}


@both_paths
def test_eval_08_values_keep_their_nesting_under_their_own_names_in_sorted_order(tmp_path, use_tpu):
    def metric_fn(outputs):
        return {"b": (TupleMetric(), (outputs,)), "a": (MeanMetric(), (torch.tensor(2.0),)), "c": 3.0}

    result = make_trainer(tmp_path, with_metrics(eval_metrics=lambda o, y: (metric_fn, [o])),
                          use_tpu=use_tpu).evaluate(batches(3))
    assert list(result)[:3] == ["a", "b", "c"]
    assert (result["a"], result["c"]) == (2.0, 3.0)
    (two, (count, array)), nested = result["b"]
    assert (two, count, nested) == (2.0, 6, {"three": 3.0}) and isinstance(count, int)
    assert isinstance(array, np.ndarray)


@pytest.mark.parametrize(("deployment", "expected"), [
    (InputPipelineConfig.PER_HOST_V1, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    (InputPipelineConfig.PER_HOST_V2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    (InputPipelineConfig.BROADCAST, [[0, 1, 2, 3], [4, 5, 6, 7]])])
def test_eval_09_tensors_of_all_replicas_are_concatenated_and_of_broadcast_ones_one_copy_is_taken(
        tmp_path, monkeypatch, deployment, expected):
    use_fake(monkeypatch, 2)
    seen = []

    def watch(outputs):
        seen.append(outputs.flatten().tolist())
        return {}

    def identity(features, mode, params):
        return make_spec(mode, features, None, None, eval_metrics=(watch, [features]))

    trainer = make_trainer(tmp_path, identity, model=None, optimizer=None, eval_batch_size=4, config=make_config(
        tpu_config=TPUConfig(per_host_input_for_training=deployment)))
    rows = torch.arange(8.0).reshape(8, 1)
    trainer.evaluate(lambda params: torch.split(rows, params["batch_size"]).__iter__())
    assert seen[1:] == expected  # the first call is the rehearsal's


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor([value]))

    def forward(self, x):
        return x * 0 + self.value


@both_paths
def test_eval_10_without_a_checkpoint_the_initial_weights_are_evaluated(tmp_path, use_tpu):
    calls = []
    trainer = make_trainer(tmp_path, with_metrics(eval_metrics=lambda o, y: (lambda o: {"value": o.squeeze(1)}, [o])),
                           model=lambda params: Constant(42.0), use_tpu=use_tpu)
    assert trainer.evaluate(lambda params: calls.append(1) or input_fn(params))["value"] == 42.0
    assert calls == [1]


@both_paths
def test_eval_10_an_explicit_checkpoint_is_used_though_model_dir_is_empty(tmp_path, use_tpu):
    path = make_trainer(tmp_path / "a", use_tpu=use_tpu).train(input_fn, steps=5).latest_checkpoint()
    empty = make_trainer(tmp_path / "b", use_tpu=use_tpu)
    assert empty.evaluate(input_fn, checkpoint_path=path)["global_step"] == 5


@pytest.mark.parametrize("name", [None, "other"])
def test_eval_11_results_are_written_to_the_evaluations_own_folder(tmp_path, name, caplog):
    class Oddity(TupleMetric):
        def compute(self):
            return "text"

    def metric_fn(outputs):
        return {"number": 2.0, "array": torch.ones(len(outputs), 3), "odd": (Oddity(), (outputs,))}

    trainer = make_trainer(tmp_path, with_metrics(eval_metrics=lambda o, y: (metric_fn, [o]))).train(input_fn, steps=5)
    with caplog.at_level(logging.WARNING, "tpuspec"):
        trainer.evaluate(input_fn, name=name)
    lines = (tmp_path / (f"eval_{name}" if name else "eval") / "metrics.jsonl").read_text().splitlines()
    entries = {entry["name"]: entry for entry in map(json.loads, lines)}
    assert {entry["step"] for entry in entries.values()} == {5}
    assert set(entries) == {"number", "array/0", "array/1", "array/2", "loss", "checkpoint_path"}
    assert trainer.latest_checkpoint() in str(entries["checkpoint_path"])
    assert "no summary is written of odd" in caplog.text


def test_eval_11_several_named_evaluations_reuse_one_step(tmp_path):
    from tests.regression import num_compiles

    trainer = make_trainer(tmp_path).train(input_fn, steps=1)
    trainer.evaluate(input_fn, name="one")
    before = num_compiles()
    trainer.evaluate(batches(5), name="two")
    assert num_compiles() == before
    assert (tmp_path / "eval_one").is_dir() and (tmp_path / "eval_two").is_dir()
