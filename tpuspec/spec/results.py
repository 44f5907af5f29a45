"""Values that travel from the step to the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from tpuspec.spec.hooks import SessionRunHook

EvalResult = dict[str, Any]
"""Result of evaluate(): metric name -> value, with 'loss' and 'global_step'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One replica's share of a batch.

    Attributes:
      features: nested dicts, tuples, namedtuples and lists of tensors [batch, ...] and None.
      labels: likewise, or None.
    """

    features: Any
    labels: Any = None

    def tensors(self) -> list[Tensor]:
        """Returns every tensor, features first."""
        if isinstance(self.features, Tensor) and isinstance(self.labels, Tensor):
            return [self.features, self.labels]
        return [leaf for leaf in pytree.tree_leaves((self.features, self.labels)) if isinstance(leaf, Tensor)]

    def map(self, fn: Callable[[Tensor], Any]) -> Batch:
        """Returns a batch of the same nesting with `fn` applied to every tensor."""
        return Batch(features=pytree.tree_map_only(Tensor, fn, self.features),
                     labels=None if self.labels is None else pytree.tree_map_only(Tensor, fn, self.labels))


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFunctions:
    """The host half of a spec: functions of one trace, called with the tensors of each step.

    Attributes:
      metric_fn: takes the 'eval_metrics' tensors.
      host_call: takes the 'host_call' tensors.
      hooks: run after this very step; the native path's form of host_call.
      eval_metric_ops: results of metric_fn, where it has already run (native path).
    """

    metric_fn: Callable[..., Any] | None = None
    host_call: Callable[..., Any] | None = None
    hooks: tuple[SessionRunHook, ...] = ()
    eval_metric_ops: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What one step leaves on one replica.

    Attributes:
      tensors: group -> its tensors: 'loss' (scalar) or 'example_losses' [batch], 'eval_metrics', 'host_call' and
        'predictions' (list or dict). A group that the step does not have is absent.
      functions: the host functions for these tensors.
      is_update: whether a training step completed its update; False while gradients accumulate.
      num_stacked: replicas whose tensors are stacked in these, [num_stacked, ...]; 0 where they are one replica's.
    """

    tensors: Mapping[str, Any]
    functions: HostFunctions = field(default_factory=HostFunctions)
    is_update: bool = True
    num_stacked: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRows:
    """Which rows of a step's batch-major tensors are real, over all replicas.

    Attributes:
      mask: bool [rows of all replicas], False for padding.
      num_rows: number of real rows.
    """

    mask: Tensor
    num_rows: int


def flat_tensors(groups: Mapping[str, Any]) -> Iterator[Any]:
    """Yields the tensors of a StepOutput's groups, group by group."""
    for tensors in groups.values():
        if isinstance(tensors, Mapping):
            yield from tensors.values()
        elif isinstance(tensors, list | tuple):
            yield from tensors
        else:
            yield tensors


def rebuild(groups: Mapping[str, Any], tensors: Iterator[Any]) -> dict[str, Any]:
    """Returns groups of the same form, filled with tensors in the order of `flat_tensors`."""
    rebuilt: dict[str, Any] = {}
    for group, form in groups.items():
        if isinstance(form, Mapping):
            rebuilt[group] = {key: next(tensors) for key in form}
        elif isinstance(form, list | tuple):
            rebuilt[group] = [next(tensors) for _ in form]
        else:
            rebuilt[group] = next(tensors)
    return rebuilt
