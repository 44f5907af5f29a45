"""Host tensors of all replicas, brought together over the devices within the step, for the chief to fetch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tpuspec.spec.backend import CompiledStep, Replica, StepFunction, Topology
from tpuspec.spec.results import Batch, HostFunctions, StepOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedStep:
    """A step whose host tensors are those of all replicas, each with one more dimension in front, [num_replicas, ...].

    Attributes:
      step: the step of one replica.
      gather: concatenates a tensor over all replicas along axis 0, in replica order.
      num_replicas: over all hosts.
    """

    step: StepFunction
    gather: Callable[[Tensor], Tensor]
    num_replicas: int

    def __call__(self, replica: Replica, batch: Batch, micro_step: int) -> StepOutput:
        """Runs the step, then brings its host tensors together."""
        output = self.step(replica, batch, micro_step)
        tensors = {group: self._stack(part) for group, part in output.tensors.items()}
        return replace(output, tensors=tensors, num_stacked=self.num_replicas)

    def _stack(self, tensors: Any) -> Any:
        if isinstance(tensors, Tensor):
            return self.gather(tensors.unsqueeze(0))
        if isinstance(tensors, Mapping):
            return {key: self._stack(tensor) for key, tensor in tensors.items()}
        return [self._stack(tensor) for tensor in tensors]


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlyOnChief:
    """A step of stacked outputs, of which the chief fetches one replica's, and the other hosts none.

    Attributes:
      step: dispatches a StackedStep on the local replicas.
      is_chief: whether this host is the chief.
    """

    step: CompiledStep
    is_chief: bool

    def __call__(self, batches: Sequence[Batch], micro_step: int = 0) -> list[StepOutput]:
        """Dispatches the step."""
        output = self.step(batches, micro_step)[0]
        return [output if self.is_chief else replace(output, tensors={}, functions=HostFunctions(), num_stacked=0)]

    def publish(self) -> None:
        """As the step's own."""
        self.step.publish()


def only_on_chief(step: CompiledStep, topology: Topology) -> CompiledStep:
    """Returns the step as the loops call it on this host."""
    return OnlyOnChief(step=step, is_chief=topology.is_chief)
