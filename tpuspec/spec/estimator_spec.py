"""TPUEstimatorSpec, the contract of model_fn, and EstimatorSpec, its form for plain CPU train and eval."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from tpuspec.errors import SpecError, SpecTypeError
from tpuspec.spec.export_output import ExportOutput, check_export_outputs, is_default_export
from tpuspec.spec.hooks import HookContext, SessionRunHook
from tpuspec.spec.host_call import HostCall, call_host_function, check_host_call
from tpuspec.spec.mode import ModeKeys
from tpuspec.spec.phase import in_phase
from tpuspec.spec.scaffold import Scaffold, make_scaffold
from tpuspec.spec.train_op import check_train_op


def _check_train_op(mode: str | None, train_op: object) -> None:
    if train_op is None:
        if mode == ModeKeys.TRAIN:
            raise SpecError(
                "Missing train_op. In TRAIN return one: CrossShardOptimizer(optimizer).minimize(loss).")
        return
    check_train_op(train_op)


def _check_loss(mode: str | None, loss: object) -> Tensor | None:
    if loss is None:
        if mode in (ModeKeys.TRAIN, ModeKeys.EVAL):
            raise SpecError(f"Missing loss. Mode {str(mode)!r} needs one.")
        return None
    if not isinstance(loss, Tensor) or loss.layout != torch.strided:
        got = f"a {loss.layout} Tensor" if isinstance(loss, Tensor) else type(loss).__name__
        raise SpecTypeError(f"loss must be Tensor (dense); got {got}.")
    if loss.numel() == 1:
        return loss if loss.ndim == 0 else loss.reshape(())
    if mode == ModeKeys.EVAL and loss.ndim == 1:
        return loss
    raise SpecError(
        f"Loss must be scalar{' or per example, [batch],' if mode == ModeKeys.EVAL else ''}; "
        f"got shape {list(loss.shape)}. Take its mean.")


def _check_predictions(mode: str | None, predictions: Any) -> Any:
    if predictions is None:
        if mode == ModeKeys.PREDICT:
            raise SpecError("Missing predictions. Mode PREDICT needs a dict of name -> Tensor [batch, ...].")
        return {}
    named = predictions.items() if isinstance(predictions, Mapping) else [(None, predictions)]
    for key, value in named:
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            name = "predictions" if key is None else f"predictions[{key}]"
            raise SpecTypeError(f"{name} must be Tensor (dense); got {type(value).__name__}.")
    return predictions


def _check_hooks(*groups: Iterable[object] | None) -> list[tuple[SessionRunHook, ...]]:
    checked = []
    for group in groups:
        hooks = tuple(group or ())
        for hook in hooks:
            if not isinstance(hook, SessionRunHook):
                raise SpecTypeError(f"All hooks must be SessionRunHook instances, given: {hook!r}.")
        checked.append(hooks)
    return checked


def _check_eval_metric_ops(eval_metric_ops: Any) -> dict[str, Any]:
    if eval_metric_ops is None:
        return {}
    if not isinstance(eval_metric_ops, dict):
        raise SpecTypeError(f"eval_metric_ops must be a dict; got {type(eval_metric_ops).__name__}.")
    for name, value in eval_metric_ops.items():
        check_metric_value(name, value)
    return eval_metric_ops


def check_metric_value(name: str, value: object) -> None:
    """Checks one value of what metric_fn returns, or of eval_metric_ops.

    Raises:
      SpecTypeError: it is no (metric, update) pair, Metric, tensor or number.
      SpecError: a Metric that was never updated.
    """
    metric, updated_here = value, False
    if isinstance(value, tuple):
        is_pair = len(value) == 2 and isinstance(value[0], Metric | MetricCollection)
        if not is_pair or not isinstance(value[1], tuple | None):
            raise SpecTypeError(
                f"Values of eval_metric_ops must be (metric_value, update_op) tuples, a torchmetrics.Metric and the "
                f"tuple of its update's arguments; got {value!r} for {name!r}.")
        metric, updated_here = value[0], value[1] is not None
    if isinstance(metric, Metric | MetricCollection):
        if not updated_here and not was_updated(metric):
            raise SpecError(
                f"Metric {name!r} was never updated. Please call update(...) on it, or return (metric, arguments).")
        return
    if not isinstance(metric, Tensor | int | float):
        raise SpecTypeError(
            f"Values of eval_metric_ops must be (metric_value, update_op) tuples, a torchmetrics.Metric, a Tensor or a "
            f"number; got {type(metric).__name__} for {name!r}.")


def was_updated(metric: Metric | MetricCollection) -> bool:
    """Whether update was called since the metric was made or reset."""
    members = metric.values(copy_state=False) if isinstance(metric, MetricCollection) else [metric]
    return any(member.update_called for member in members)


class _Replaceable:
    """Copies with changes, validated again."""

    __slots__ = ()

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with `changes`, validated again.

        Raises:
          SpecError: the mode would change, or a check of the constructor fails.
        """
        spec: Any = self
        if changes.get("mode", spec.mode) != spec.mode:
            raise SpecError(f"mode of {type(self).__name__} cannot be changed; it is {spec.mode!r}.")
        if "predictions" in changes and "export_outputs" not in changes and is_default_export(
                spec.export_outputs, spec.predictions):
            changes["export_outputs"] = None
        return dataclasses.replace(spec, **changes)


@dataclass(frozen=True)
class EstimatorSpec(_Replaceable):
    """What model_fn returns for plain CPU train and eval; validated when it is made.

    Attributes:
      mode: a ModeKeys value.
      predictions: Tensor or dict of name -> Tensor; {} where none.
      loss: scalar; in EVAL also [batch].
      train_op: as in TPUEstimatorSpec.
      eval_metric_ops: dict of name -> (metric, update), Metric, or number.
      export_outputs: dict of name -> ExportOutput; looked at in PREDICT only.
      training_chief_hooks, training_hooks, evaluation_hooks, prediction_hooks: SessionRunHooks, kept as tuples.
      scaffold: a Scaffold; a default one where None is given.

    Raises:
      SpecError, SpecTypeError: a field breaks its rule; hooks are checked first, then train_op, loss, predictions,
        export_outputs.

    Source: tf.estimator.EstimatorSpec.
    """

    mode: str | None
    predictions: Any = None
    loss: Tensor | None = None
    train_op: Any = None
    eval_metric_ops: dict[str, Any] | None = None
    export_outputs: dict[str, ExportOutput] | None = None
    training_chief_hooks: Iterable[SessionRunHook] | None = None
    training_hooks: Iterable[SessionRunHook] | None = None
    scaffold: Scaffold | None = None
    evaluation_hooks: Iterable[SessionRunHook] | None = None
    prediction_hooks: Iterable[SessionRunHook] | None = None

    def __post_init__(self) -> None:
        names = ("training_hooks", "evaluation_hooks", "prediction_hooks", "training_chief_hooks")
        for name, hooks in zip(names, _check_hooks(*(getattr(self, name) for name in names)), strict=True):
            object.__setattr__(self, name, hooks)
        _check_common(self)
        object.__setattr__(self, "eval_metric_ops", _check_eval_metric_ops(self.eval_metric_ops))
        if self.scaffold is not None and not isinstance(self.scaffold, Scaffold):
            raise SpecTypeError(f"scaffold must be a tpuspec.Scaffold; got {type(self.scaffold).__name__}.")
        object.__setattr__(self, "scaffold", self.scaffold or Scaffold())


@dataclass(frozen=True)
class TPUEstimatorSpec(_Replaceable):
    """What model_fn returns: what runs on the device and what runs on the host CPU; validated when it is made.

    Attributes:
      mode: a ModeKeys value.
      predictions: in PREDICT a dict of name -> Tensor [batch, ...]; {} where none.
      loss: scalar; in EVAL also per example, [batch], and then exact under padding.
      train_op: `CrossShardOptimizer(optimizer).minimize(loss)`, an optimizer (meaning minimize(loss)), or a callable
        without arguments that does its own backward and steps.
      eval_metrics: (metric_fn, tensors); metric_fn runs on the host each eval step, on the real rows of all replicas.
      export_outputs: dict of name -> ExportOutput; looked at in PREDICT only.
      scaffold_fn: makes a Scaffold on the host, once per call; must not capture a tensor.
      host_call: (fn, tensors); fn runs on the host each step, after the update, on tensors concatenated over replicas.

    Raises:
      SpecError, SpecTypeError, SpecUsageError: the first check that fails, in the order eval_metrics, host_call,
        train_op, loss, predictions, export_outputs.

    Source: tf.contrib.tpu.TPUEstimatorSpec.
    """

    mode: str | None
    predictions: Any = None
    loss: Tensor | None = None
    train_op: Any = None
    eval_metrics: HostCall | tuple[Callable[..., Any], Any] | None = None
    export_outputs: dict[str, ExportOutput] | None = None
    scaffold_fn: Callable[[], Scaffold] | None = None
    host_call: HostCall | tuple[Callable[..., Any], Any] | None = None

    def __post_init__(self) -> None:
        check_host_call("eval_metrics", self.eval_metrics)
        check_host_call("host_call", self.host_call)
        _check_common(self)

    def as_estimator_spec(self) -> EstimatorSpec:
        """Returns the equivalent EstimatorSpec for CPU train and eval.

        metric_fn is called now, on the tensors as they are; host_call becomes a hook after the user's.

        Raises:
          SpecError, SpecTypeError, SpecUsageError: a host call, or what metric_fn returns, breaks its rule.
        """
        check_host_call("eval_metrics", self.eval_metrics)
        check_host_call("host_call", self.host_call)
        eval_metric_ops = None
        if self.eval_metrics is not None:
            with in_phase("metric_fn"):
                eval_metric_ops = call_host_function("eval_metrics", *self.eval_metrics)
            if eval_metric_ops is None:
                raise SpecTypeError("what metric_fn returns must be a dict; got NoneType. Does it lack a return?")
        hooks = () if self.host_call is None else (HostCallHook(HostCall(*self.host_call)),)
        return EstimatorSpec(
            mode=self.mode, predictions=self.predictions, loss=self.loss, train_op=self.train_op,
            eval_metric_ops=eval_metric_ops, export_outputs=self.export_outputs,
            training_hooks=hooks, evaluation_hooks=hooks, prediction_hooks=hooks,
            scaffold=make_scaffold(self.scaffold_fn))


class HostCallHook(SessionRunHook):
    """Calls one step's host_call after the step; what as_estimator_spec makes of `host_call`."""

    def __init__(self, host_call: HostCall) -> None:
        self.host_call = host_call

    def after_run(self, context: HookContext) -> None:
        """Calls the function with its tensors."""
        call_host_function("host_call", *self.host_call)


def _check_common(spec: EstimatorSpec | TPUEstimatorSpec) -> None:
    """Checks the fields that both specs have, in TPUEstimator's order, and stores their normal forms."""
    _check_train_op(spec.mode, spec.train_op)
    object.__setattr__(spec, "loss", _check_loss(spec.mode, spec.loss))
    object.__setattr__(spec, "predictions", _check_predictions(spec.mode, spec.predictions))
    if spec.mode == ModeKeys.PREDICT:
        object.__setattr__(spec, "export_outputs", check_export_outputs(spec.export_outputs, spec.predictions))
