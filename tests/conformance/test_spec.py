"""Rows SPEC-01 .. SPEC-14 of the conformance list: what a spec accepts, which error it raises, and which one wins."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from tpuspec.errors import TpuspecError
from tpuspec.spec.estimator_spec import EstimatorSpec, TPUEstimatorSpec
from tpuspec.spec.export_output import ClassificationOutput, PredictOutput, RegressionOutput
from tpuspec.spec.hooks import HookContext, SessionRunHook
from tpuspec.spec.mode import ModeKeys
from tpuspec.spec.scaffold import Scaffold
from tpuspec.spec.train_op import CrossShardOptimizer

SPECS = [TPUEstimatorSpec, EstimatorSpec]
HOST_FIELDS = ["eval_metrics", "host_call"]
HOOK_FIELDS = ["training_chief_hooks", "training_hooks", "evaluation_hooks", "prediction_hooks"]
ALL_MODES = [ModeKeys.TRAIN, ModeKeys.EVAL, ModeKeys.PREDICT]

both_specs = pytest.mark.parametrize("make_spec", SPECS)
both_host_fields = pytest.mark.parametrize("name", HOST_FIELDS)


@contextlib.contextmanager
def raises_only(kind: type[Exception], match: str) -> Iterator[None]:
    """Expects one of tpuspec's errors which is a `kind`, and none of the other builtin kinds."""
    with pytest.raises(kind, match=match) as caught:
        yield
    others = tuple({ValueError, TypeError, RuntimeError} - {kind})
    assert isinstance(caught.value, TpuspecError)
    assert not isinstance(caught.value, others)


def do_nothing() -> None:
    """A legal train_op: a callable without arguments."""


def sparse_vector() -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[0]]), torch.tensor([1.0]), size=(1,), check_invariants=True)


def valid_fields(mode: str | None) -> dict[str, Any]:
    """The least that each mode accepts."""
    return {
        ModeKeys.TRAIN: {"loss": torch.tensor(1.0), "train_op": do_nothing},
        ModeKeys.EVAL: {"loss": torch.tensor(1.0)},
        ModeKeys.PREDICT: {"predictions": {"probability": torch.zeros(2)}},
        None: {},
    }[mode]


def make_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)


# SPEC-01: field, a value that breaks its rule, the error; in the order in which they are checked.
_COMMON_FAULTS = [
    ("train_op", "minimize", TypeError, "train_op must be"),
    ("loss", 1.0, TypeError, "loss must be Tensor"),
    ("predictions", {"classes": 1}, TypeError, r"predictions\[classes\] must be Tensor"),
    ("export_outputs", [], TypeError, "export_outputs must be dict"),
]
TPU_FAULTS = [
    ("eval_metrics", 3, ValueError, "eval_metrics should be tuple or list"),
    ("host_call", 3, ValueError, "host_call should be tuple or list"),
    *_COMMON_FAULTS,
]
HOOK_FAULTS = [(name, [3], TypeError, "All hooks must be SessionRunHook instances") for name in HOOK_FIELDS]


def fault_pairs() -> Iterator[Any]:
    for first, second in itertools.combinations(TPU_FAULTS, 2):
        yield pytest.param(TPUEstimatorSpec, first, second, id=f"tpu-{first[0]}-before-{second[0]}")
    for first, second in itertools.combinations(_COMMON_FAULTS, 2):
        yield pytest.param(EstimatorSpec, first, second, id=f"cpu-{first[0]}-before-{second[0]}")
    for first, second in itertools.product(HOOK_FAULTS, _COMMON_FAULTS):
        yield pytest.param(EstimatorSpec, first, second, id=f"cpu-{first[0]}-before-{second[0]}")


@pytest.mark.parametrize(("make_spec", "first", "second"), list(fault_pairs()))
def test_spec_01_the_earlier_of_two_broken_rules_is_the_one_reported(make_spec, first, second):
    # PREDICT, since export_outputs is looked at there only.
    fields = valid_fields(ModeKeys.PREDICT) | {second[0]: second[1], first[0]: first[1]}
    with raises_only(first[2], first[3]):
        make_spec(mode=ModeKeys.PREDICT, **fields)
    del fields[first[0]]
    with raises_only(second[2], second[3]):
        make_spec(mode=ModeKeys.PREDICT, **(valid_fields(ModeKeys.PREDICT) | fields))


@pytest.mark.parametrize(("make_spec", "faults"), [
    (TPUEstimatorSpec, TPU_FAULTS), (EstimatorSpec, [*HOOK_FAULTS, *_COMMON_FAULTS])])
def test_spec_01_with_every_rule_broken_mending_in_order_meets_the_errors_in_order(make_spec, faults):
    fields = {name: value for name, value, _, _ in faults}
    for name, _, kind, match in faults:
        with raises_only(kind, match):
            make_spec(mode=ModeKeys.PREDICT, **fields)
        if name == "predictions":
            fields[name] = {"p": torch.zeros(2)}
        else:
            del fields[name]
    assert make_spec(mode=ModeKeys.PREDICT, **fields).mode == ModeKeys.PREDICT


@both_specs
def test_spec_01_a_missing_train_op_is_reported_before_a_missing_loss(make_spec):
    with raises_only(ValueError, "Missing train_op"):
        make_spec(mode=ModeKeys.TRAIN)


@both_specs
def test_spec_01_a_missing_loss_is_reported_before_bad_predictions(make_spec):
    with raises_only(ValueError, "Missing loss"):
        make_spec(mode=ModeKeys.EVAL, predictions=1)


@both_specs
@pytest.mark.parametrize("mode", [None, "distill"])
def test_spec_01_mode_is_not_checked_against_a_known_set(make_spec, mode):
    spec = make_spec(mode=mode)
    assert spec.mode == mode
    assert spec.loss is None


@both_host_fields
@pytest.mark.parametrize("value", [
    pytest.param(do_nothing, id="bare function"),
    pytest.param({"fn": do_nothing}, id="dict"),
    pytest.param(torch.zeros(2), id="tensor"),
    pytest.param(0, id="falsy number"),
])
def test_spec_02_a_host_call_that_is_no_pair_is_a_value_error(name, value):
    with raises_only(ValueError, rf"^{name} should be tuple or list"):
        TPUEstimatorSpec(mode=None, **{name: value})


@both_host_fields
@pytest.mark.parametrize("value", [(), (do_nothing,), [do_nothing, [], []]])
def test_spec_02_a_host_call_of_other_than_two_elements_is_a_value_error(name, value):
    with raises_only(ValueError, rf"^{name} should have two elements"):
        TPUEstimatorSpec(mode=None, **{name: value})


@both_host_fields
@pytest.mark.parametrize("fn", [None, "metric_fn", torch.zeros(2)], ids=["None", "str", "tensor"])
def test_spec_02_a_function_that_is_not_callable_is_a_type_error(name, fn):
    with raises_only(TypeError, rf"^{name}\[0\] should be callable"):
        TPUEstimatorSpec(mode=None, **{name: (fn, [])})


@both_host_fields
@pytest.mark.parametrize("tensors", [torch.zeros(2), None, "loss", {1, 2}], ids=["tensor", "None", "str", "set"])
def test_spec_02_tensors_that_are_no_list_or_dict_are_a_value_error(name, tensors):
    with raises_only(ValueError, rf"^{name}\[1\] should be tuple or list, or dict"):
        TPUEstimatorSpec(mode=None, **{name: (lambda t: t, tensors)})


@both_host_fields
def test_spec_02_the_number_of_elements_is_checked_before_the_function_and_that_before_the_tensors(name):
    with raises_only(ValueError, "should have two elements"):
        TPUEstimatorSpec(mode=None, **{name: (3, 3, 3)})
    with raises_only(TypeError, "should be callable"):
        TPUEstimatorSpec(mode=None, **{name: (3, 3)})


@both_host_fields
@pytest.mark.parametrize("value", [
    None, (lambda t: t, [torch.zeros(2)]), [lambda t: t, (torch.zeros(2),)], (lambda t: t, {"t": torch.zeros(2)})],
    ids=["absent", "tuple of list", "list of tuple", "tuple of dict"])
def test_spec_02_every_legal_form_of_a_host_call_is_kept_as_given(name, value):
    assert getattr(TPUEstimatorSpec(mode=None, **{name: value}), name) is value


class Methods:
    """Callables whose own first argument is bound."""

    def two(self, a, b):
        return a, b

    def __call__(self, a, b):
        return a, b


def take_two(a, b):
    return a, b


def take_two_one_with_default(a, b=None):
    return a, b


@both_host_fields
@pytest.mark.parametrize(("fn", "num_parameters"), [
    pytest.param(take_two, 2, id="function"),
    pytest.param(take_two_one_with_default, 2, id="a default counts"),
    pytest.param(Methods().two, 2, id="bound self does not count"),
    pytest.param(Methods(), 2, id="callable object"),
    pytest.param(functools.partial(take_two, 1), 1, id="positional of a partial does not count"),
    pytest.param(functools.partial(take_two, b=1), 1, id="keyword of a partial does not count"),
    pytest.param(lambda: None, 0, id="no parameters"),
])
def test_spec_03_a_list_that_does_not_fit_the_positional_parameters_is_a_runtime_error(name, fn, num_parameters):
    for num_tensors in {0, 1, 2, 3} - {num_parameters}:
        with raises_only(RuntimeError, rf"In TPUEstimatorSpec\.{name}, length of tensors {num_tensors} does not match "
                                       rf"method args of the function, which takes {num_parameters}\."):
            TPUEstimatorSpec(mode=None, **{name: (fn, [torch.zeros(1)] * num_tensors)})
    fitting = (fn, [torch.zeros(1)] * num_parameters)
    assert getattr(TPUEstimatorSpec(mode=None, **{name: fitting}), name) is fitting


@both_host_fields
@pytest.mark.parametrize("fn", [lambda *tensors: tensors, lambda a, b, *rest: rest], ids=["*args", "a, b, *args"])
@pytest.mark.parametrize("num_tensors", [0, 1, 5])
def test_spec_03_a_function_that_takes_any_number_is_not_checked(name, fn, num_tensors):
    host_call = (fn, [torch.zeros(1)] * num_tensors)
    assert getattr(TPUEstimatorSpec(mode=None, **{name: host_call}), name) is host_call


@both_host_fields
@pytest.mark.parametrize("tensors", [{}, {"c": torch.zeros(1)}, dict.fromkeys("abc", torch.zeros(1))])
def test_spec_04_a_dict_is_not_checked_against_the_function_at_construction(name, tensors):
    host_call = (take_two, tensors)
    assert getattr(TPUEstimatorSpec(mode=None, **{name: host_call}), name) is host_call


def call_through_cpu_spec(name: str, fn: Callable[..., Any], tensors: dict[str, Tensor]) -> None:
    """Makes the host function run, as plain CPU train and eval do."""
    spec = TPUEstimatorSpec(mode=None, **{name: (fn, tensors)}).as_estimator_spec()
    for hook in spec.training_hooks:
        hook.after_run(HookContext(mode=ModeKeys.TRAIN))


@both_host_fields
@pytest.mark.parametrize(("tensors", "match"), [
    (dict.fromkeys(("a", "b", "surplus"), torch.zeros(1)), "unexpected keyword argument 'surplus'"),
    ({"a": torch.zeros(1)}, "missing .*'b'"),
], ids=["surplus", "missing"])
def test_spec_04_a_dict_that_does_not_fit_raises_pythons_type_error_and_warns_at_the_call(
        name, tensors, match, caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(TypeError, match=match) as caught:
        call_through_cpu_spec(name, take_two, tensors)
    assert not isinstance(caught.value, TpuspecError)
    assert [record.levelname for record in caplog.records if name in record.getMessage()] == ["WARNING"]


@both_host_fields
def test_spec_04_a_type_error_of_the_function_itself_is_raised_unchanged(name):
    own_error = TypeError("cannot add")

    def fail(a):
        raise own_error

    with pytest.raises(TypeError, match=r"^cannot add$") as caught:
        call_through_cpu_spec(name, fail, {"a": torch.zeros(1)})
    assert caught.value is own_error


@both_specs
def test_spec_05_train_needs_a_train_op(make_spec):
    with raises_only(ValueError, "Missing train_op"):
        make_spec(mode=ModeKeys.TRAIN, loss=torch.tensor(1.0))


@both_specs
@pytest.mark.parametrize("mode", [*ALL_MODES, None])
@pytest.mark.parametrize("train_op", [
    pytest.param("minimize", id="str"),
    pytest.param(0.1, id="number"),
    pytest.param(torch.tensor(1.0), id="tensor"),
    pytest.param({"": do_nothing}, id="dict"),
    pytest.param(lambda loss: loss, id="callable that needs an argument"),
])
def test_spec_05_a_train_op_of_the_wrong_kind_is_a_type_error_in_any_mode(make_spec, mode, train_op):
    with raises_only(TypeError, "train_op must be"):
        make_spec(mode=mode, **(valid_fields(mode) | {"train_op": train_op}))


@both_specs
@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("train_op", [
    pytest.param(CrossShardOptimizer(make_optimizer()).minimize(torch.tensor(1.0)), id="TrainOp"),
    pytest.param(CrossShardOptimizer(make_optimizer()), id="CrossShardOptimizer"),
    pytest.param(make_optimizer(), id="torch optimizer"),
    pytest.param(do_nothing, id="callable"),
    pytest.param(lambda times=1: None, id="callable with a default"),
])
def test_spec_05_each_kind_of_train_op_is_kept_in_any_mode(make_spec, mode, train_op):
    assert make_spec(mode=mode, **(valid_fields(mode) | {"train_op": train_op})).train_op is train_op


@both_specs
@pytest.mark.parametrize("mode", [ModeKeys.EVAL, ModeKeys.PREDICT])
def test_spec_05_eval_and_predict_need_no_train_op(make_spec, mode):
    assert make_spec(mode=mode, **valid_fields(mode)).train_op is None


@both_specs
@pytest.mark.parametrize("mode", [ModeKeys.TRAIN, ModeKeys.EVAL])
def test_spec_06_train_and_eval_need_a_loss(make_spec, mode):
    with raises_only(ValueError, "Missing loss"):
        make_spec(mode=mode, train_op=do_nothing)


@both_specs
def test_spec_06_predict_needs_no_loss(make_spec):
    assert make_spec(mode=ModeKeys.PREDICT, **valid_fields(ModeKeys.PREDICT)).loss is None


@both_specs
@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("loss", [1.0, [1.0], sparse_vector()], ids=["float", "list", "sparse"])
def test_spec_06_a_loss_that_is_no_dense_tensor_is_a_type_error(make_spec, mode, loss):
    with raises_only(TypeError, "loss must be Tensor"):
        make_spec(mode=mode, **(valid_fields(mode) | {"loss": loss}))


@both_specs
@pytest.mark.parametrize(("mode", "shape"), [
    (ModeKeys.TRAIN, (2,)), (ModeKeys.TRAIN, (0,)), (ModeKeys.TRAIN, (2, 1)),
    (ModeKeys.PREDICT, (2,)), (ModeKeys.EVAL, (2, 3)), (None, (2,))])
def test_spec_06_a_loss_of_several_elements_is_a_value_error(make_spec, mode, shape):
    with raises_only(ValueError, "Loss must be scalar"):
        make_spec(mode=mode, **(valid_fields(mode) | {"loss": torch.zeros(shape)}))


@both_specs
def test_spec_06_in_eval_a_loss_per_example_is_kept_as_it_is(make_spec):
    loss = torch.tensor([1.0, 2.0, 3.0])
    assert make_spec(mode=ModeKeys.EVAL, loss=loss).loss is loss


@both_specs
@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_spec_06_a_loss_of_one_element_becomes_rank_0_and_still_trains(make_spec, shape):
    weight = torch.full(shape, 3.0, requires_grad=True)
    loss = make_spec(mode=ModeKeys.TRAIN, loss=weight * 2.0, train_op=do_nothing).loss
    assert loss.shape == ()
    assert loss.item() == 6.0
    loss.backward()
    assert weight.grad.item() == 2.0


@both_specs
def test_spec_07_predict_needs_predictions(make_spec):
    with raises_only(ValueError, "Missing predictions"):
        make_spec(mode=ModeKeys.PREDICT)


@both_specs
@pytest.mark.parametrize("mode", [ModeKeys.TRAIN, ModeKeys.EVAL])
def test_spec_07_outside_predict_no_predictions_become_an_empty_dict(make_spec, mode):
    assert make_spec(mode=mode, **valid_fields(mode)).predictions == {}


@both_specs
@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("value", [1.0, [torch.zeros(2)], {"inner": torch.zeros(2)}, sparse_vector()],
                         ids=["number", "list", "nested dict", "sparse"])
def test_spec_07_a_prediction_that_is_no_dense_tensor_is_a_type_error_that_names_it(make_spec, mode, value):
    with raises_only(TypeError, r"predictions\[scores\] must be Tensor"):
        make_spec(mode=mode, **(valid_fields(mode) | {"predictions": {"fine": torch.zeros(2), "scores": value}}))


@both_specs
def test_spec_07_a_bare_number_as_predictions_is_a_type_error(make_spec):
    with raises_only(TypeError, "predictions must be Tensor"):
        make_spec(mode=ModeKeys.PREDICT, predictions=1.0)


@both_specs
def test_spec_07_a_bare_tensor_is_legal(make_spec):
    predictions = torch.zeros(2)
    assert make_spec(mode=ModeKeys.PREDICT, predictions=predictions).predictions is predictions


@both_specs
@pytest.mark.parametrize("export_outputs", [
    [], PredictOutput(torch.zeros(2)), ("serving_default", PredictOutput(torch.zeros(2)))],
    ids=["list", "output", "tuple"])
def test_spec_08_export_outputs_that_are_no_dict_are_a_type_error(make_spec, export_outputs):
    with raises_only(TypeError, "export_outputs must be dict"):
        make_spec(mode=ModeKeys.PREDICT, predictions=torch.zeros(2), export_outputs=export_outputs)


@both_specs
@pytest.mark.parametrize("name", [5, None])
def test_spec_08_a_name_of_an_export_output_that_is_no_str_is_a_type_error(make_spec, name):
    outputs = {"serving_default": PredictOutput(torch.zeros(2)), name: PredictOutput(torch.zeros(2))}
    with raises_only(TypeError, f"Names in export_outputs must be str; got {name}"):
        make_spec(mode=ModeKeys.PREDICT, predictions=torch.zeros(2), export_outputs=outputs)


@both_specs
@pytest.mark.parametrize("value", [torch.zeros(2), None, PredictOutput], ids=["tensor", "None", "class"])
def test_spec_08_a_value_that_is_no_export_output_is_a_type_error(make_spec, value):
    outputs = {"serving_default": PredictOutput(torch.zeros(2)), "other": value}
    with raises_only(TypeError, "Values in export_outputs must be ExportOutput objects"):
        make_spec(mode=ModeKeys.PREDICT, predictions=torch.zeros(2), export_outputs=outputs)


@both_specs
@pytest.mark.parametrize("mode", [ModeKeys.TRAIN, ModeKeys.EVAL, None])
@pytest.mark.parametrize("export_outputs", [3, {"a": 1, "b": 2}, {}])
def test_spec_08_outside_predict_export_outputs_are_kept_untouched(make_spec, mode, export_outputs):
    assert make_spec(mode=mode, export_outputs=export_outputs, **valid_fields(mode)).export_outputs is export_outputs


@both_specs
def test_spec_09_without_export_outputs_the_predictions_are_served_by_name(make_spec):
    scores, classes = torch.zeros(2), torch.ones(2)
    spec = make_spec(mode=ModeKeys.PREDICT, predictions={"scores": scores, "classes": classes})
    assert list(spec.export_outputs) == ["serving_default"]
    output = spec.export_outputs["serving_default"]
    assert isinstance(output, PredictOutput)
    assert list(output.outputs) == ["scores", "classes"]
    assert output.outputs["scores"] is scores
    assert output.outputs["classes"] is classes


@both_specs
def test_spec_09_without_export_outputs_a_bare_tensor_is_served(make_spec):
    predictions = torch.zeros(2)
    spec = make_spec(mode=ModeKeys.PREDICT, predictions=predictions)
    assert list(spec.export_outputs) == ["serving_default"]
    assert [t is predictions for t in spec.export_outputs["serving_default"].outputs.values()] == [True]


@both_specs
def test_spec_09_one_named_output_is_served_by_default_too(make_spec):
    output = RegressionOutput(torch.zeros(2))
    spec = make_spec(mode=ModeKeys.PREDICT, predictions=torch.zeros(2), export_outputs={"price": output})
    assert set(spec.export_outputs) == {"price", "serving_default"}
    assert all(value is output for value in spec.export_outputs.values())


@both_specs
@pytest.mark.parametrize("names", [["serving_default"], ["serving_default", "scores"], ["a", "b", "serving_default"]])
def test_spec_09_outputs_with_the_default_among_them_are_unchanged(make_spec, names):
    outputs = {name: ClassificationOutput(scores=torch.zeros(2)) for name in names}
    spec = make_spec(mode=ModeKeys.PREDICT, predictions=torch.zeros(2), export_outputs=outputs)
    assert list(spec.export_outputs) == names
    assert all(spec.export_outputs[name] is outputs[name] for name in names)


@both_specs
def test_spec_09_several_outputs_without_the_default_are_a_value_error(make_spec):
    outputs = {"a": PredictOutput(torch.zeros(2)), "b": PredictOutput(torch.zeros(2))}
    with raises_only(ValueError, "Multiple export_outputs were provided"):
        make_spec(mode=ModeKeys.PREDICT, predictions=torch.zeros(2), export_outputs=outputs)


@pytest.mark.parametrize("name", HOOK_FIELDS)
@pytest.mark.parametrize("hook", [None, "hook", SessionRunHook], ids=["None", "str", "class, not an instance"])
def test_spec_10_a_hook_that_is_no_hook_is_a_type_error_that_shows_it(name, hook):
    with raises_only(TypeError, f"All hooks must be SessionRunHook instances, given: {re.escape(repr(hook))}"):
        EstimatorSpec(mode=None, **{name: [SessionRunHook(), hook]})


@pytest.mark.parametrize("name", HOOK_FIELDS)
def test_spec_10_hooks_are_kept_as_tuples_in_their_order(name):
    hooks = [SessionRunHook(), SessionRunHook()]
    spec = EstimatorSpec(mode=None, **{name: iter(hooks)})
    assert getattr(spec, name) == tuple(hooks)
    assert all(getattr(spec, other) == () for other in HOOK_FIELDS if other != name)


def test_spec_10_tpu_estimator_spec_has_its_eight_fields_and_no_hooks():
    assert [field.name for field in dataclasses.fields(TPUEstimatorSpec)] == [
        "mode", "predictions", "loss", "train_op", "eval_metrics", "export_outputs", "scaffold_fn", "host_call"]
    with pytest.raises(TypeError, match="training_chief_hooks"):
        TPUEstimatorSpec(mode=None, training_chief_hooks=[])


@pytest.mark.parametrize("value", [[("a", 1)], 3, MeanMetric(), ()], ids=["list", "number", "metric", "tuple"])
def test_spec_11_eval_metric_ops_that_are_no_dict_are_a_type_error(value):
    with raises_only(TypeError, "eval_metric_ops must be a dict"):
        EstimatorSpec(mode=None, eval_metric_ops=value)


@pytest.mark.parametrize("value", [
    pytest.param("0.5", id="str"),
    pytest.param(None, id="None"),
    pytest.param([MeanMetric(), ()], id="list"),
    pytest.param({}, id="dict"),
    pytest.param((MeanMetric(),), id="1-tuple"),
    pytest.param((MeanMetric(), (), ()), id="3-tuple"),
    pytest.param((0.5, ()), id="pair without a metric"),
    pytest.param((MeanMetric(), 0.5), id="pair whose update is no tuple"),
    pytest.param((MeanMetric, ()), id="pair of a metric class"),
])
def test_spec_11_a_metric_value_of_another_kind_is_a_type_error_that_names_it(value):
    with raises_only(TypeError, r"Values of eval_metric_ops must be \(metric_value, update_op\) tuples.*'error'"):
        EstimatorSpec(mode=None, eval_metric_ops={"fine": 1.0, "error": value})


def updated_metric() -> MeanMetric:
    metric = MeanMetric()
    metric.update(2.0)
    return metric


@pytest.mark.parametrize("value", [MeanMetric(), (MeanMetric(), None)], ids=["metric", "pair without update"])
def test_spec_11_a_metric_that_was_never_updated_is_a_value_error(value):
    with raises_only(ValueError, r"'accuracy' was never updated.*Please call update"):
        EstimatorSpec(mode=None, eval_metric_ops={"accuracy": value})


@pytest.mark.parametrize("value", [
    pytest.param((MeanMetric(), (torch.ones(3), (1.0, 2.0))), id="pair to update, arguments nested"),
    pytest.param((updated_metric(), None), id="pair already updated"),
    pytest.param(updated_metric(), id="updated metric"),
    pytest.param(torch.ones(3), id="tensor"),
    pytest.param(0.5, id="float"),
    pytest.param(1, id="int"),
])
def test_spec_11_each_kind_of_metric_value_is_kept(value):
    assert EstimatorSpec(mode=None, eval_metric_ops={"m": value}).eval_metric_ops["m"] is value


@both_specs
def test_spec_12_replace_validates_again(make_spec):
    spec = make_spec(mode=ModeKeys.TRAIN, **valid_fields(ModeKeys.TRAIN))
    with raises_only(ValueError, "Loss must be scalar"):
        spec.replace(loss=torch.zeros(2))
    with raises_only(TypeError, "train_op must be"):
        spec.replace(train_op="minimize")


def test_spec_12_replace_of_a_tpu_spec_validates_its_host_calls_again():
    spec = TPUEstimatorSpec(mode=ModeKeys.EVAL, loss=torch.tensor(1.0))
    with raises_only(RuntimeError, "length of tensors 1 does not match"):
        spec.replace(eval_metrics=(take_two, [torch.zeros(2)]))


@both_specs
def test_spec_12_replace_changes_a_copy_only(make_spec):
    fields = valid_fields(ModeKeys.TRAIN)
    spec, other_loss = make_spec(mode=ModeKeys.TRAIN, **fields), torch.tensor(2.0)
    changed = spec.replace(loss=other_loss)
    assert type(changed) is make_spec
    assert (changed.loss, spec.loss) == (other_loss, fields["loss"])
    assert changed.train_op is fields["train_op"]


@both_specs
@pytest.mark.parametrize("mode", [ModeKeys.EVAL, ModeKeys.PREDICT, None])
def test_spec_12_replace_refuses_another_mode(make_spec, mode):
    spec = make_spec(mode=ModeKeys.TRAIN, **valid_fields(ModeKeys.TRAIN))
    with raises_only(ValueError, rf"mode of {make_spec.__name__} cannot be changed"):
        spec.replace(mode=mode)


@both_specs
@pytest.mark.parametrize("mode", [ModeKeys.TRAIN, "train"])
def test_spec_12_replace_allows_the_same_mode(make_spec, mode):
    spec = make_spec(mode=ModeKeys.TRAIN, **valid_fields(ModeKeys.TRAIN))
    assert spec.replace(mode=mode, loss=torch.tensor(5.0)).loss.item() == 5.0


@pytest.mark.parametrize("scaffold", ["scaffold", Scaffold, lambda: Scaffold(), False],
                         ids=["str", "class", "function", "False"])
def test_spec_13_a_scaffold_of_the_wrong_type_is_a_type_error(scaffold):
    with raises_only(TypeError, r"scaffold must be a tpuspec\.Scaffold"):
        EstimatorSpec(mode=None, scaffold=scaffold)


def test_spec_13_no_scaffold_becomes_an_empty_one_and_a_given_one_is_kept():
    given = Scaffold(init_fn=lambda module: None)
    assert EstimatorSpec(mode=None).scaffold == Scaffold()
    assert EstimatorSpec(mode=None, scaffold=given).scaffold is given


def mean_of(values: Tensor) -> dict[str, Any]:
    return {"mean": values.mean()}


def test_spec_14_as_estimator_spec_calls_metric_fn_on_the_tensors_and_keeps_the_common_fields():
    loss, predictions = torch.tensor(1.0), {"p": torch.zeros(2)}
    spec = TPUEstimatorSpec(mode=ModeKeys.EVAL, loss=loss, predictions=predictions, train_op=do_nothing,
                            eval_metrics=(mean_of, [torch.tensor([1.0, 3.0])])).as_estimator_spec()
    assert isinstance(spec, EstimatorSpec)
    assert spec.eval_metric_ops == {"mean": torch.tensor(2.0)}
    assert (spec.mode, spec.loss, spec.predictions, spec.train_op) == (ModeKeys.EVAL, loss, predictions, do_nothing)
    assert not {"eval_metrics", "host_call", "scaffold_fn"} & {field.name for field in dataclasses.fields(spec)}


def test_spec_14_without_eval_metrics_there_are_no_metric_ops_and_without_host_call_no_hooks():
    spec = TPUEstimatorSpec(mode=ModeKeys.EVAL, loss=torch.tensor(1.0)).as_estimator_spec()
    assert spec.eval_metric_ops == {}
    assert (spec.training_hooks, spec.evaluation_hooks, spec.prediction_hooks) == ((), (), ())


@pytest.mark.parametrize("tensors", [[torch.tensor([7])], {"step": torch.tensor([7])}], ids=["list", "dict"])
def test_spec_14_host_call_becomes_one_hook_in_each_list_that_calls_it_after_each_step(tensors):
    steps = []
    spec = TPUEstimatorSpec(
        mode=None, host_call=(lambda step: steps.append(step.item()), tensors)).as_estimator_spec()
    hook_lists = (spec.training_hooks, spec.evaluation_hooks, spec.prediction_hooks)
    assert [len(hooks) for hooks in hook_lists] == [1, 1, 1]
    assert spec.training_chief_hooks == ()
    context = HookContext(mode=ModeKeys.TRAIN)
    for calls, (hook,) in enumerate(hook_lists):
        hook.before_run(context)
        assert steps == [7] * calls
        hook.after_run(context)
        assert steps == [7] * (calls + 1)


def test_spec_14_scaffold_fn_is_called_once_and_its_scaffold_kept():
    made = []

    def scaffold_fn():
        made.append(Scaffold(init_fn=lambda module: None))
        return made[-1]

    spec = TPUEstimatorSpec(mode=None, scaffold_fn=scaffold_fn).as_estimator_spec()
    assert len(made) == 1
    assert spec.scaffold is made[0]


@both_host_fields
def test_spec_14_host_calls_are_checked_again_at_conversion(name):
    tensors = [torch.zeros(1)]
    spec = TPUEstimatorSpec(mode=None, **{name: (mean_of, tensors)})
    tensors.append(torch.zeros(1))
    with raises_only(RuntimeError, rf"In TPUEstimatorSpec\.{name}, length of tensors 2"):
        spec.as_estimator_spec()


def test_spec_14_what_metric_fn_returns_is_checked():
    spec = TPUEstimatorSpec(mode=ModeKeys.EVAL, loss=torch.tensor(1.0), eval_metrics=(lambda: [1.0], []))
    with raises_only(TypeError, "must be a dict"):
        spec.as_estimator_spec()


def test_spec_14_an_older_spec_keeps_its_own_host_calls():
    calls = []
    older = TPUEstimatorSpec(mode=None, eval_metrics=(lambda: {"age": 1.0}, []),
                             host_call=(lambda: calls.append("older"), []))
    newer = TPUEstimatorSpec(mode=None, eval_metrics=(lambda: {"age": 2.0}, []),
                             host_call=(lambda: calls.append("newer"), []))
    converted = newer.as_estimator_spec(), older.as_estimator_spec()
    assert [spec.eval_metric_ops for spec in converted] == [{"age": 2.0}, {"age": 1.0}]
    for spec in converted:
        spec.training_hooks[0].after_run(HookContext(mode=ModeKeys.TRAIN))
    assert calls == ["newer", "older"]
