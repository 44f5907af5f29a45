"""What a training step does with its loss: an optimizer that reduces over replicas, and the op it makes."""

from __future__ import annotations

import contextlib
import inspect
import numbers
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tpuspec.errors import ConfigError, ConfigTypeError, SpecError, SpecTypeError
from tpuspec.precision import updating

REDUCTIONS = ("mean", "sum")


class GradientReducer(Protocol):
    """Reduces gradients over replicas and steps; a backend is one."""

    def reduce_gradients(self, optimizer: torch.optim.Optimizer, reduction: str) -> None:
        """Reduces the optimizer's gradients over all replicas and applies them."""

    def constrain(self, tensor: Tensor, axes: Sequence[Any]) -> Tensor:
        """Fixes how a tensor of the step lies on a mesh; without one returns it as it is."""
        ...


_reducer: ContextVar[GradientReducer | None] = ContextVar("tpuspec_reducer", default=None)
_is_reducing: ContextVar[bool] = ContextVar("tpuspec_is_reducing", default=False)


@contextlib.contextmanager
def reduce_with(reducer: GradientReducer) -> Iterator[None]:
    """Makes `reducer` the one that CrossShardOptimizer.step uses within the block."""
    token = _reducer.set(reducer)
    try:
        yield
    finally:
        _reducer.reset(token)


def constrain(tensor: Tensor, axes: Sequence[Any]) -> Tensor:
    """Within a step on a mesh, fixes over which of its axes a tensor is split; elsewhere returns it as it is.

    Parameters lie as `TPUConfig.sharding` says; what is computed from them XLA lays out as it finds best. Where it does
    not find what is, say so here. The values do not change; the gradient is split likewise.

    Args:
      tensor: any shape.
      axes: for each dim a mesh axis, several, or None where it is whole: `["data", None, "model"]`.

    Raises:
      SpecError: an axis is not one of the mesh's, or stands there twice, or there are more or fewer entries than dims.
    """
    reducer = _reducer.get()
    return tensor if reducer is None else reducer.constrain(tensor, axes)


@contextlib.contextmanager
def only_reduced_steps() -> Iterator[None]:
    """Refuses, within the block and on this thread, each optimizer's step that CrossShardOptimizer does not make.

    That of an optimizer which the Trainer does not know too: the replicas would drift apart all the same.

    Raises:
      SpecError: an optimizer steps on the gradients of one replica, which would drift from the others.
    """
    thread = threading.get_ident()

    def refuse_unreduced(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        if not _is_reducing.get() and threading.get_ident() == thread:
            raise SpecError(
                "CrossShardOptimizer must be used for model training on TPUs. train_op calls "
                f"{type(optimizer).__name__}.step itself, on the gradients of one replica of several: call "
                "CrossShardOptimizer(optimizer).step() there.")

    handle = register_optimizer_step_pre_hook(refuse_unreduced)
    try:
        yield
    finally:
        handle.remove()


class CrossShardOptimizer:
    """Reduces the gradients over all replicas before the wrapped optimizer applies them.

    Args:
      optimizer: the torch optimizer that the Trainer made and passed to model_fn.
      reduction: 'mean' or 'sum' over replicas.

    Raises:
      ConfigTypeError: `optimizer` is no torch optimizer.
      ConfigError: `reduction` is unknown, or the optimizer's step needs a closure.

    Source: tf.tpu.CrossShardOptimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, reduction: str = "mean") -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigTypeError(
                f"CrossShardOptimizer takes a torch.optim.Optimizer; got {type(optimizer).__name__}. model_fn's "
                "optimizer argument is None outside TRAIN, and where the Trainer was given no optimizer.")
        if reduction not in REDUCTIONS:
            raise ConfigError(f"CrossShardOptimizer reduction must be one of {REDUCTIONS}; got {reduction!r}.")
        _check_needs_no_closure(optimizer)
        self.optimizer = optimizer
        self.reduction = reduction

    def minimize(self, loss: Tensor, *, clip_grad_norm: float | None = None, accumulate_steps: int = 1) -> TrainOp:
        """Returns the op that minimizes `loss`; nothing runs yet.

        Args:
          loss: scalar.
          clip_grad_norm: largest global norm of the reduced gradients; None leaves them.
          accumulate_steps: batches whose gradients are averaged for one update; reduced once, at the last.

        Raises:
          ConfigError: `clip_grad_norm` or `accumulate_steps` is not positive, or of the wrong type.
        """
        return TrainOp(loss=loss, optimizer=self, clip_grad_norm=clip_grad_norm, accumulate_steps=accumulate_steps)

    def step(self, *, clip_grad_norm: float | None = None) -> None:
        """Reduces the gradients, clips them, and steps; for a train_op that is a callable.

        Outside a step of the Trainer it is a plain `optimizer.step()`.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(updating(self.optimizer.param_groups[0]["params"][0].device))
            if clip_grad_norm is not None:
                # A pre-hook of step() runs after the reduction: clipping each replica's share would bias the norm.
                handle = self.optimizer.register_step_pre_hook(
                    lambda optimizer, args, kwargs: _clip(optimizer, clip_grad_norm))
                stack.callback(handle.remove)
            token = _is_reducing.set(True)
            stack.callback(_is_reducing.reset, token)
            reducer = _reducer.get()
            if reducer is None:
                self.optimizer.step()
            else:
                reducer.reduce_gradients(self.optimizer, self.reduction)

    def zero_grad(self) -> None:
        """Drops the gradients."""
        self.optimizer.zero_grad(set_to_none=True)


def _check_needs_no_closure(optimizer: torch.optim.Optimizer) -> None:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"{type(optimizer).__name__} computes the loss repeatedly in a step, by a closure that minimize() and an "
            "optimizer as train_op cannot give it. Make train_op a function that calls optimizer.step(closure), on one "
            "replica; docs/capture.md has one.")


def _clip(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOp:
    """One update: backward of `loss`, reduction, clipping, optimizer step. Made by CrossShardOptimizer.minimize.

    Attributes:
      loss: scalar to minimize.
      optimizer: a CrossShardOptimizer, or a bare optimizer, which serves one replica only.
      clip_grad_norm: largest global norm of the reduced gradients.
      accumulate_steps: batches per update.
    """

    loss: Tensor
    optimizer: CrossShardOptimizer | torch.optim.Optimizer
    clip_grad_norm: float | None = None
    accumulate_steps: int = 1

    def __post_init__(self) -> None:
        norm = self.clip_grad_norm
        if norm is not None and (not isinstance(norm, numbers.Real) or isinstance(norm, bool) or not norm > 0):
            raise ConfigError(f"clip_grad_norm must be a positive number or None; got {norm!r}.")
        if not self.reduces:
            _check_needs_no_closure(self.torch_optimizer)
        steps = self.accumulate_steps
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ConfigError(f"accumulate_steps must be a positive int; got {steps!r}.")

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer below the wrapping."""
        return self.optimizer.optimizer if isinstance(self.optimizer, CrossShardOptimizer) else self.optimizer

    @property
    def reduces(self) -> bool:
        """Whether the update reduces over replicas."""
        return isinstance(self.optimizer, CrossShardOptimizer)

    def run(self, micro_step: int) -> bool:
        """Runs one batch's share of the update.

        Args:
          micro_step: number of the batch within the update, 0 .. accumulate_steps - 1.

        Returns:
          Whether this batch completed the update.
        """
        loss = self.loss if self.accumulate_steps == 1 else self.loss / self.accumulate_steps
        loss.backward()
        if micro_step + 1 < self.accumulate_steps:
            return False
        wrapped = self.optimizer if isinstance(self.optimizer, CrossShardOptimizer) else CrossShardOptimizer(
            self.optimizer)
        wrapped.step(clip_grad_norm=self.clip_grad_norm)
        # Live gradients would be outputs of the step too: another graph, other fusions, other last bits.
        wrapped.zero_grad()
        return True


def check_train_op(train_op: object) -> None:
    """Checks the kind of a train_op that is not None.

    Raises:
      SpecTypeError: it is no TrainOp, optimizer, or callable without arguments.
    """
    if isinstance(train_op, TrainOp | CrossShardOptimizer | torch.optim.Optimizer):
        return
    if not callable(train_op) or not _takes_no_arguments(train_op):
        raise SpecTypeError(
            "train_op must be a TrainOp (CrossShardOptimizer(optimizer).minimize(loss)), an optimizer, or a callable "
            f"without arguments; got {type(train_op).__name__}.")


def _takes_no_arguments(fn: Callable[..., object]) -> bool:
    try:
        inspect.signature(fn).bind()
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return True
    return True


def as_train_op(train_op: object, loss: Tensor) -> TrainOp | Callable[[], object]:
    """Turns an optimizer into minimize(loss); leaves a TrainOp or a callable as it is."""
    if isinstance(train_op, CrossShardOptimizer):
        return train_op.minimize(loss)
    if isinstance(train_op, torch.optim.Optimizer):
        return TrainOp(loss=loss, optimizer=train_op)
    check_train_op(train_op)
    return train_op  # type: ignore[return-value]
