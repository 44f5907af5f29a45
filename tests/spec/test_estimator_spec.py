"""The specs as values, and their conversion with real parts; the single rules are in the conformance tests."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric

from tpuspec.errors import SpecError, SpecTypeError
from tpuspec.spec.estimator_spec import EstimatorSpec, TPUEstimatorSpec, check_metric_value
from tpuspec.spec.export_output import PredictOutput
from tpuspec.spec.hooks import HookContext, SessionRunHook
from tpuspec.spec.mode import ModeKeys
from tpuspec.spec.scaffold import Scaffold
from tpuspec.spec.train_op import CrossShardOptimizer

both_specs = pytest.mark.parametrize("make_spec", [TPUEstimatorSpec, EstimatorSpec])


def test_modes_are_the_strings_of_tpu_estimator():
    assert [mode.value for mode in ModeKeys] == ["train", "eval", "infer"]
    assert ModeKeys.PREDICT == "infer"
    assert str(ModeKeys.EVAL) == "eval"


@both_specs
def test_a_mode_may_be_given_as_its_string(make_spec):
    with pytest.raises(SpecError, match="Missing train_op"):
        make_spec(mode="train")
    with pytest.raises(SpecError, match=r"Missing loss\. Mode 'eval' needs one"):
        make_spec(mode="eval")
    with pytest.raises(SpecError, match="Missing predictions"):
        make_spec(mode="infer")


def test_estimator_spec_has_its_eleven_fields_in_order():
    assert [field.name for field in dataclasses.fields(EstimatorSpec)] == [
        "mode", "predictions", "loss", "train_op", "eval_metric_ops", "export_outputs", "training_chief_hooks",
        "training_hooks", "scaffold", "evaluation_hooks", "prediction_hooks"]


def test_tpu_estimator_spec_takes_its_fields_by_position():
    loss, predictions = torch.tensor(1.0), {"p": torch.zeros(2)}
    host_call, metrics = (lambda: None, []), (lambda: {}, [])
    spec = TPUEstimatorSpec(ModeKeys.EVAL, predictions, loss, None, metrics, None, Scaffold, host_call)
    assert (spec.predictions, spec.loss, spec.eval_metrics) == (predictions, loss, metrics)
    assert (spec.scaffold_fn, spec.host_call) == (Scaffold, host_call)


@both_specs
def test_only_mode_is_needed(make_spec):
    with pytest.raises(TypeError, match="mode"):
        make_spec()
    assert make_spec(mode=None).train_op is None


@both_specs
def test_a_spec_cannot_be_changed(make_spec):
    spec = make_spec(mode=None)
    with pytest.raises(dataclasses.FrozenInstanceError, match="loss"):
        spec.loss = torch.tensor(1.0)


@both_specs
def test_replace_of_an_unknown_field_is_refused(make_spec):
    with pytest.raises(TypeError, match="los"):
        make_spec(mode=None).replace(los=torch.tensor(1.0))


@both_specs
def test_replacing_the_predictions_replaces_the_output_that_was_made_of_them(make_spec):
    spec = make_spec(mode=ModeKeys.PREDICT, predictions={"old": torch.zeros(2)})
    changed = spec.replace(predictions={"new": torch.ones(2)})
    assert list(changed.export_outputs["serving_default"].outputs) == ["new"]
    assert list(spec.export_outputs["serving_default"].outputs) == ["old"]


@both_specs
def test_replacing_the_predictions_keeps_the_outputs_that_the_user_gave(make_spec):
    output = PredictOutput(torch.zeros(2))
    spec = make_spec(mode=ModeKeys.PREDICT, predictions=torch.zeros(2), export_outputs={"mine": output})
    changed = spec.replace(predictions={"new": torch.ones(2)})
    assert changed.export_outputs == {"mine": output, "serving_default": output}


@both_specs
def test_an_error_shows_the_shape_that_was_got(make_spec):
    with pytest.raises(SpecError, match=r"got shape \[3, 2\]. Take its mean"):
        make_spec(mode=ModeKeys.TRAIN, train_op=lambda: None, loss=torch.zeros(3, 2))


@both_specs
def test_only_eval_offers_a_loss_per_example(make_spec):
    with pytest.raises(SpecError, match=r"Loss must be scalar or per example, \[batch\]"):
        make_spec(mode=ModeKeys.EVAL, loss=torch.zeros(3, 2))
    with pytest.raises(SpecError, match="Loss must be scalar; got"):
        make_spec(mode=ModeKeys.TRAIN, train_op=lambda: None, loss=torch.zeros(3))


def test_conversion_keeps_a_train_op_that_trains():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = CrossShardOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    features, before = torch.ones(2, 3), model.weight.detach().clone()
    loss = model(features).square().mean()
    spec = TPUEstimatorSpec(mode=ModeKeys.TRAIN, loss=loss, train_op=optimizer.minimize(loss)).as_estimator_spec()
    spec.train_op.run(0)
    assert not torch.equal(model.weight, before)
    assert model(features).square().mean() < loss


def test_conversion_passes_a_dict_of_tensors_to_metric_fn_by_keyword():
    def metric_fn(labels, logits):
        return {"right": (logits.argmax(dim=1) == labels).float().mean(), "mean": (MeanMetric(), (labels,))}

    tensors = {"logits": torch.tensor([[0.0, 1.0], [1.0, 0.0]]), "labels": torch.tensor([1, 1])}
    spec = TPUEstimatorSpec(mode=ModeKeys.EVAL, loss=torch.tensor(1.0), eval_metrics=(metric_fn, tensors))
    metrics = spec.as_estimator_spec().eval_metric_ops
    assert metrics["right"].item() == 0.5
    metric, update = metrics["mean"]
    metric.update(*update)
    assert metric.compute().item() == 1.0


def test_a_metric_fn_that_returns_nothing_is_refused():
    # Most likely a forgotten return: its metrics would vanish in silence.
    spec = TPUEstimatorSpec(mode=ModeKeys.EVAL, loss=torch.tensor(1.0), eval_metrics=(lambda: None, []))
    with pytest.raises(SpecTypeError, match="must be a dict; got NoneType"):
        spec.as_estimator_spec()


def test_conversion_does_not_call_host_call_itself():
    called = []
    spec = TPUEstimatorSpec(mode=None, host_call=(lambda: called.append(1), [])).as_estimator_spec()
    assert called == []
    assert all(isinstance(hook, SessionRunHook) for hook in spec.training_hooks)


def test_host_call_sees_the_tensors_as_they_are_after_the_step():
    weight, seen = torch.zeros(1), []
    spec = TPUEstimatorSpec(mode=None, host_call=(lambda w: seen.append(w.item()), [weight])).as_estimator_spec()
    weight.add_(1.0)
    spec.training_hooks[0].after_run(HookContext(mode=ModeKeys.TRAIN))
    assert seen == [1.0]


def test_conversion_refuses_a_scaffold_fn_that_returns_none():
    with pytest.raises(SpecError, match="scaffold_fn returns None"):
        TPUEstimatorSpec(mode=None, scaffold_fn=lambda: None).as_estimator_spec()


def test_scaffold_fn_is_not_called_at_construction():
    def scaffold_fn():
        raise AssertionError("called")

    assert TPUEstimatorSpec(mode=None, scaffold_fn=scaffold_fn).scaffold_fn is scaffold_fn


def test_conversion_keeps_the_export_outputs():
    output = PredictOutput(torch.zeros(2))
    spec = TPUEstimatorSpec(mode=ModeKeys.PREDICT, predictions=torch.zeros(2), export_outputs={"served": output})
    assert spec.as_estimator_spec().export_outputs == {"served": output, "serving_default": output}


def test_a_metric_that_was_reset_counts_as_never_updated():
    metric = MeanMetric()
    metric.update(1.0)
    check_metric_value("mean", metric)
    metric.reset()
    with pytest.raises(SpecError, match="'mean' was never updated"):
        check_metric_value("mean", metric)
