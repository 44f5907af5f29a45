"""One step of one replica: model_fn is called, its spec checked, and its device half run."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tpuspec.config import RunConfig
from tpuspec.errors import SpecError, SpecTypeError, SpecUsageError
from tpuspec.precision import computing
from tpuspec.spec.backend import Replica
from tpuspec.spec.estimator_spec import EstimatorSpec, TPUEstimatorSpec
from tpuspec.spec.functions import call_by_name
from tpuspec.spec.host_call import check_host_tensors
from tpuspec.spec.mode import ModeKeys
from tpuspec.spec.phase import in_phase
from tpuspec.spec.results import Batch, HostFunctions, StepOutput
from tpuspec.spec.train_op import TrainOp, as_train_op, only_reduced_steps

Spec = TPUEstimatorSpec | EstimatorSpec


_WIDER = {torch.uint16: "int32", torch.uint32: "int64", torch.uint64: "int64"}


def check_unsigned(owner: str, tensors: Iterable[Tensor]) -> None:
    """Refuses unsigned integers that come back from XLA as signed ones.

    Raises:
      SpecTypeError: names their owner.
    """
    for tensor in tensors:
        if (wider := _WIDER.get(tensor.dtype)) is not None:
            raise SpecTypeError(f"{owner} must not hold {tensor.dtype} on XLA, which gives it back as a signed integer "
                                f"of that size. Cast it: tensor.to(torch.{wider}), or array.astype('{wider}').")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFnCall:
    """How model_fn is called in one mode.

    Attributes:
      model_fn: the user's.
      mode: the mode.
      params: the Trainer's, with 'batch_size', 'use_tpu' and 'context' added.
      config: the run's settings.
      on_xla: whether the step runs on an XLA backend, where EVAL and PREDICT need a TPUEstimatorSpec.
      batch_size: rows of a replica's batch where they are static, else None.
      num_replicas: model copies over all hosts.
    """

    model_fn: Callable[..., Any]
    mode: ModeKeys
    params: Mapping[str, Any]
    config: RunConfig
    on_xla: bool
    batch_size: int | None
    num_replicas: int

    def __call__(self, replica: Replica, batch: Batch) -> Spec:
        """Returns the checked spec of one step.

        Raises:
          SpecError, SpecUsageError: model_fn returned no spec, one of another mode, or one that cannot work here.
        """
        optimizers: Any = None
        if self.mode is ModeKeys.TRAIN and replica.optimizers:
            optimizers = replica.optimizers.get("", replica.optimizers)
        # A clone: what model_fn keeps of it must hold the value before this step's update.
        with computing(self.config.precision, replica.device), in_phase("model_fn"):
            spec = call_by_name(self.model_fn, {
                "features": batch.features, "labels": None if self.mode is ModeKeys.PREDICT else batch.labels,
                "mode": self.mode, "params": copy.deepcopy(dict(self.params)), "config": copy.deepcopy(self.config),
                "model": replica.model, "optimizer": optimizers, "global_step": replica.global_step.clone()})
        self._check(spec)
        return spec

    def _check(self, spec: object) -> None:
        if not isinstance(spec, TPUEstimatorSpec | EstimatorSpec):
            raise SpecError("model_fn should return an EstimatorSpec or a TPUEstimatorSpec; got "
                            f"{type(spec).__name__}.")
        if self.on_xla and self.mode is not ModeKeys.TRAIN and not isinstance(spec, TPUEstimatorSpec):
            verb = "evaluation" if self.mode is ModeKeys.EVAL else "prediction"
            raise SpecUsageError(
                f"estimator_spec used by TPU {verb} must have type`TPUEstimatorSpec`. Got {type(spec).__name__}.")
        if spec.mode != self.mode:
            raise SpecError(f"model_fn was called in mode {str(self.mode)!r}; its spec has mode {spec.mode!r}. Pass on "
                            "the mode argument: TPUEstimatorSpec(mode=mode, ...).")
        if self.on_xla and isinstance(spec, EstimatorSpec) and spec.training_chief_hooks:
            raise SpecError("training_chief_hooks returned by EstimatorSpec is not supported in TPUEstimator. Return "
                            "them as training_hooks, or return a TPUEstimatorSpec.")

    def check_tensors(self, spec: Spec) -> None:
        """Checks that the tensors for the host can be put together over replicas.

        Raises:
          SpecError, SpecTypeError, SpecUsageError: one cannot; the error names it.
        """
        if self.on_xla and isinstance(spec, TPUEstimatorSpec):
            if self.mode is ModeKeys.EVAL and spec.eval_metrics is not None:
                check_host_tensors("eval_metrics", spec.eval_metrics[1], batch_size=self.batch_size)
            if spec.host_call is not None:
                check_host_tensors("host_call", spec.host_call[1], batch_size=None)
        loss = spec.loss
        if loss is not None and loss.ndim == 1 and self.batch_size is not None and loss.shape[0] != self.batch_size:
            raise SpecError(f"a per-example loss must have one value per row, [{self.batch_size}]; got shape "
                            f"{list(loss.shape)}.")
        if self.mode is ModeKeys.PREDICT and self.on_xla:
            _check_predictions(spec.predictions, self.batch_size)


def _check_predictions(predictions: Any, batch_size: int | None) -> None:
    if not isinstance(predictions, Mapping):
        raise SpecTypeError("TPUEstimatorSpec.predictions must be dict of Tensors; got "
                            f"{type(predictions).__name__}. Name it: predictions={{'output': tensor}}.")
    for key, tensor in predictions.items():
        if tensor.ndim == 0 or tensor.shape[0] != batch_size:
            raise SpecError(f"The tensor with key ({key}) in TPUEstimatorSpec.predictions must be batch-major, "
                            f"[{batch_size}, ...]; got shape {list(tensor.shape)}.")


def check_optimizer(train_op: TrainOp, replica: Replica, num_replicas: int) -> None:
    """Checks that an update keeps its state and reduces where it must.

    Raises:
      SpecError: the optimizer is not the Trainer's, or nothing reduces over several replicas.
    """
    if not any(train_op.torch_optimizer is own for own in replica.optimizers.values()):
        raise SpecError(
            "train_op's optimizer is not one that the Trainer made, so its state would be lost from step to step. "
            "Pass optimizer=function to Trainer, and use model_fn's optimizer argument.")
    if num_replicas > 1 and not train_op.reduces:
        raise SpecError("CrossShardOptimizer must be used for model training on TPUs.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainStep:
    """A training step: forward, backward, update, and the tensors for the host."""

    call: ModelFnCall

    def __call__(self, replica: Replica, batch: Batch, micro_step: int) -> StepOutput:
        """Runs one batch's share of an update on one replica.

        Raises:
          SpecError: the optimizer is not the Trainer's, or nothing reduces over several replicas.
        """
        with only_reduced_steps() if self.call.num_replicas > 1 else contextlib.nullcontext():
            spec = self.call(replica, batch)
            self.call.check_tensors(spec)
            assert spec.loss is not None, "checked by the spec in mode TRAIN"
            is_update = self._run_train_op(spec, replica, micro_step)
        if is_update:
            with torch.no_grad():
                replica.global_step.add_(1)
        # One that is a buffer would show the next step's value when it is fetched.
        loss = spec.loss.detach() if spec.loss.requires_grad else spec.loss.clone()
        tensors: dict[str, Any] = {"loss": loss}
        return _output(tensors, spec, self.call, is_update=is_update)

    def _run_train_op(self, spec: Spec, replica: Replica, micro_step: int) -> bool:
        train_op = as_train_op(spec.train_op, spec.loss)  # type: ignore[arg-type]
        if not isinstance(train_op, TrainOp):
            with computing(self.call.config.precision, replica.device):  # it may compute more
                train_op()
            return True
        check_optimizer(train_op, replica, self.call.num_replicas)
        is_update = train_op.run(micro_step)
        if is_update and replica.model is not None:
            # Also of parameters that this optimizer does not have: nothing else would ever drop theirs.
            replica.model.zero_grad(set_to_none=True)
        return is_update


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardStep:
    """A step of evaluation or prediction: no gradients, and the tensors for the host."""

    call: ModelFnCall

    def __call__(self, replica: Replica, batch: Batch, micro_step: int) -> StepOutput:
        """Runs one batch on one replica."""
        with torch.no_grad():
            spec = self.call(replica, batch)
        self.call.check_tensors(spec)
        tensors: dict[str, Any] = {}
        if self.call.mode is ModeKeys.PREDICT:
            tensors["predictions"] = _detach(spec.predictions)
        elif spec.loss is not None:
            tensors["example_losses" if spec.loss.ndim else "loss"] = spec.loss.detach()
        return _output(tensors, spec, self.call)


def _output(tensors: dict[str, Any], spec: Spec, call: ModelFnCall, *, is_update: bool = True) -> StepOutput:
    if not call.on_xla:
        return StepOutput(tensors=tensors, functions=_native_functions(spec, call.mode), is_update=is_update)
    metric_fn = host_call = None
    if isinstance(spec, TPUEstimatorSpec):
        if call.mode is ModeKeys.EVAL and spec.eval_metrics is not None:
            metric_fn, tensors["eval_metrics"] = spec.eval_metrics[0], _detach(spec.eval_metrics[1])
        if spec.host_call is not None:
            host_call, tensors["host_call"] = spec.host_call[0], _copy(spec.host_call[1])
    return StepOutput(tensors=tensors, is_update=is_update,
                      functions=HostFunctions(metric_fn=metric_fn, host_call=host_call))


def _native_functions(spec: Spec, mode: ModeKeys) -> HostFunctions:
    """Converts the spec as CPU train and eval do; the scaffold was made once before the first step.

    Host functions run on the host's tensors: those of a GPU are copied.
    """
    if isinstance(spec, TPUEstimatorSpec):
        spec = spec.replace(
            scaffold_fn=None,
            eval_metrics=spec.eval_metrics and (spec.eval_metrics[0], _map(spec.eval_metrics[1], _to_host)),
            host_call=spec.host_call and (spec.host_call[0], _map(spec.host_call[1], _to_host)))
        spec = spec.as_estimator_spec()
        hooks = {ModeKeys.TRAIN: spec.training_hooks, ModeKeys.EVAL: spec.evaluation_hooks,
                 ModeKeys.PREDICT: spec.prediction_hooks}[mode]
        return HostFunctions(hooks=tuple(hooks or ()), eval_metric_ops=spec.eval_metric_ops)
    return HostFunctions(eval_metric_ops=pytree.tree_map_only(Tensor, _to_host, spec.eval_metric_ops))


def _to_host(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type == "cpu" else tensor.detach().cpu()


def _detach(tensors: Any) -> Any:
    return _map(tensors, Tensor.detach)


def _copy(tensors: Any) -> Any:
    # A copy: a tensor that shares memory with a parameter would show the next step's value when it is fetched.
    return _map(tensors, lambda tensor: tensor.detach().clone())


def _map(tensors: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tensors, Tensor):
        return fn(tensors)
    if isinstance(tensors, Mapping):
        return {name: fn(tensor) for name, tensor in tensors.items()}
    return [fn(tensor) for tensor in tensors]
