"""Before the first step of a mode: model_fn is traced once on the first batch, and all that can be wrong is checked.

Nothing is compiled or kept. A metric_fn is tried on zeros of the right shapes: its names and kinds are checked, its
values thrown away, and an error of its own (zeros may not suit it) is left for the first real step to show. That is
done once: where the step is compiled already, the first real result shows as soon.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchmetrics import Metric

from tpuspec.data.index_limits import IndexLimits
from tpuspec.drain.metric_state import check_metric_names
from tpuspec.errors import SpecError, SpecUsageError, TpuspecError
from tpuspec.loops.step import ModelFnCall, Spec, check_optimizer, check_unsigned
from tpuspec.spec.backend import Backend, Replica
from tpuspec.spec.estimator_spec import EstimatorSpec, TPUEstimatorSpec
from tpuspec.spec.functions import is_user_frame
from tpuspec.spec.hooks import SessionRunHook
from tpuspec.spec.host_call import call_host_function, check_keywords, named_tensors
from tpuspec.spec.instances import instances_of
from tpuspec.spec.mode import ModeKeys
from tpuspec.spec.results import Batch
from tpuspec.spec.scaffold import Scaffold, make_scaffold
from tpuspec.spec.train_op import TrainOp, as_train_op

logger = logging.getLogger(__name__)

_RAW = ("Check failed", "torch_xla", "stack trace", "INTERNAL:", "INVALID_ARGUMENT", "UNIMPLEMENTED")
"""What only XLA's own C++ says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """What the first spec says about the whole call.

    Attributes:
      scaffold: made once, on the host.
      hooks: the spec's own hooks for the mode.
    """

    scaffold: Scaffold
    hooks: tuple[SessionRunHook, ...]


def rehearse(backend: Backend, replica: Replica, call: ModelFnCall, batch: Batch, *, tried: set[Hashable],
             limits: IndexLimits | None = None) -> Rehearsal:
    """Traces model_fn once and checks its spec.

    Args:
      backend: puts back what the trace changes.
      replica: the replica to trace on.
      call: how model_fn is called.
      batch: the first batch, on the device.
      tried: metric functions that were tried, with their shapes, by earlier calls; this one is added.
      limits: notes what model_fn indexes with tensors of the batch; None without XLA.

    Raises:
      SpecError, SpecTypeError, SpecUsageError: a rule of the spec is broken.
      TypeError: the keys of host tensors are not the parameters of their function.
    """
    def trace() -> Spec:
        observed = contextlib.nullcontext() if limits is None else limits.observe(batch)
        with torch.set_grad_enabled(call.mode is ModeKeys.TRAIN), observed:
            return call(replica, batch)

    try:
        spec = backend.rehearse(replica, trace)
    except RuntimeError as error:
        if limits is None or isinstance(error, TpuspecError):
            raise
        place = _place_of(error, replica.model)
        if not any(mark in str(error) for mark in _RAW):
            error.add_note(f"model_fn raised it in its rehearsal on XLA, {place}.")
            raise
        raise SpecUsageError(
            f"XLA cannot compute what model_fn asks for, {place}: {str(error).strip().splitlines()[0]}. Plain PyTorch "
            "(use_tpu=False) may say it more clearly, or compute it; else use another operation there.") from error
    scaffold = _make_scaffold(spec, on_xla=call.on_xla)
    call.check_tensors(spec)
    if limits is not None and isinstance(spec, TPUEstimatorSpec):
        metrics, host_call = spec.eval_metrics or (None, ()), spec.host_call or (None, ())
        check_unsigned("the spec", [tensor for tensor in pytree.tree_leaves(
            [spec.predictions, metrics[1], host_call[1]]) if isinstance(tensor, Tensor)])
    if call.mode is ModeKeys.TRAIN:
        _check_train_op(spec, replica, call)
    if isinstance(spec, EstimatorSpec):
        if call.mode is ModeKeys.EVAL:
            check_metric_names(spec.eval_metric_ops)
        hooks: dict[ModeKeys, Iterable[SessionRunHook] | None] = {
            ModeKeys.TRAIN: [*(spec.training_chief_hooks or ()), *(spec.training_hooks or ())],
            ModeKeys.EVAL: spec.evaluation_hooks, ModeKeys.PREDICT: spec.prediction_hooks}
        return Rehearsal(scaffold=scaffold, hooks=tuple(hooks[call.mode] or ()))
    if spec.host_call is not None:
        check_keywords("host_call", spec.host_call[0], spec.host_call[1])
    if call.mode is ModeKeys.EVAL and spec.eval_metrics is not None:
        check_keywords("eval_metrics", spec.eval_metrics[0], spec.eval_metrics[1])
        _rehearse_metrics(spec.eval_metrics[0], spec.eval_metrics[1], tried)
    return Rehearsal(scaffold=scaffold, hooks=())


def _place_of(error: BaseException, model: nn.Module | None) -> str:
    """Returns "at FILE:LINE, in module 'encoder.0' (Linear)", the innermost of each."""
    names = {id(part): name for name, part in model.named_modules()} if model is not None else {}
    line, module, traceback = "a place unknown", "", error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        if is_user_frame(frame):
            line = f"{Path(frame.f_code.co_filename).name}:{traceback.tb_lineno}"
        if name := names.get(id(frame.f_locals.get("self"))):
            module = f", in module {name!r} ({type(frame.f_locals['self']).__name__})"
        traceback = traceback.tb_next
    return f"at {line}{module}"


def _check_train_op(spec: Spec, replica: Replica, call: ModelFnCall) -> None:
    train_op = as_train_op(spec.train_op, spec.loss)  # type: ignore[arg-type]
    if not isinstance(train_op, TrainOp):
        return
    if not train_op.loss.requires_grad:
        raise SpecError("the loss in train_op does not depend on any parameter that requires a gradient. Compute it "
                        "with model_fn's model argument.")
    num_at_once = call.config.tpu_config.steps_per_execution
    if call.on_xla and num_at_once > 1 and train_op.accumulate_steps > 1:
        raise SpecError(f"accumulate_steps={train_op.accumulate_steps} makes an update of several batches, and "
                        f"steps_per_execution={num_at_once} a program of several updates. Set one of them to 1.")
    check_optimizer(train_op, replica, call.num_replicas)


def _make_scaffold(spec: Spec, *, on_xla: bool) -> Scaffold:
    if isinstance(spec, TPUEstimatorSpec):
        return make_scaffold(spec.scaffold_fn)
    assert spec.scaffold is not None, "EstimatorSpec makes a default one"
    if on_xla and spec.scaffold != Scaffold():
        logger.warning("EstimatorSpec.Scaffold is ignored by TPU train/eval. Please use TPUEstimatorSpec.")
        return Scaffold()
    return spec.scaffold


def _rehearse_metrics(metric_fn: Callable[..., Any], tensors: Any, tried: set[Hashable]) -> None:
    def zeros(tensor: Tensor) -> Tensor:
        return torch.zeros(tensor.shape, dtype=tensor.dtype)

    # By its code: model_fn makes the function anew in each call.
    code = getattr(metric_fn, "__code__", type(metric_fn))
    key = (code, tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in named_tensors(tensors)))
    if key in tried:
        return
    tried.add(key)
    fake = ({name: zeros(t) for name, t in tensors.items()} if isinstance(tensors, Mapping)
            else [zeros(t) for t in tensors])
    with _metrics_as_before():
        try:
            results = call_host_function("eval_metrics", metric_fn, fake)
        except TpuspecError:
            raise
        except Exception as error:
            logger.debug("metric_fn raised on zeros: %s", error)
            return
        check_metric_names(results)


@contextlib.contextmanager
def _metrics_as_before() -> Iterator[None]:
    """Puts back the state of every metric of the process: metric_fn may update some that it does not return."""
    metrics = instances_of(Metric)
    states = [(metric, metric._copy_state_dict(), metric._update_count, metric._computed) for metric in metrics]
    try:
        yield
    finally:
        for metric, state, update_count, computed in states:
            if metric._update_count != update_count:
                for name, value in state.items():
                    setattr(metric, name, value)
                metric._update_count, metric._computed = update_count, computed
