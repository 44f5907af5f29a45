"""Replicas that part: their weights are compared at loop boundaries, every so often."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tpuspec.errors import SpecUsageError
from tpuspec.loops.session import Session

_FIRST_DISTANCE = 50
_MOST_DIFFERENCE = 1e-5
"""Of the sum of sizes: hosts with other processors may round otherwise."""


class ReplicaDriftError(SpecUsageError):
    """The replicas of a model no longer have the same weights."""


@dataclass(slots=True, kw_only=True)
class DriftCheck:
    """Compares sums of the parameters over all replicas of all hosts.

    Every replica applies the same update, of reduced gradients, to the same weights. Buffers may differ: statistics of
    BatchNorm are each replica's own.

    Attributes:
      session: its replicas are compared; where there is one, nothing is.
      most_steps: between two checks; the distance begins at 50 and is doubled up to that.
    """

    session: Session
    most_steps: int
    _distance: int = _FIRST_DISTANCE
    _next: int | None = None

    def at_boundary(self, step: int) -> None:
        """Compares, if it is time; waits for the devices then.

        Args:
          step: global step of the state that modules hold now.

        Raises:
          ReplicaDriftError: a parameter differs; it names the first one.
        """
        session = self.session
        is_alone = len(session.replicas) == session.backend.coordinator.num_hosts == 1
        if is_alone or session.module is None or next(session.module.parameters(), None) is None:
            return
        if self._next is None:
            self._next = step + min(self._distance, self.most_steps)
        if step < self._next:
            return
        self._distance = min(2 * self._distance, self.most_steps)
        self._next = step + self._distance
        self._compare(step)

    def _compare(self, step: int) -> None:
        session = self.session
        assert session.module is not None
        own = session.backend.fetch([_checksums(replica.model) for replica in session.replicas if replica.model])
        found = session.backend.coordinator.exchange([sums.tolist() for sums in own], name="sums of the parameters")
        (first, *others) = [replica for host in found for replica in host]
        names = [name for name, _ in session.module.named_parameters()]
        for ordinal, other in enumerate(others, start=1):
            for name, (one_sum, size), (other_sum, _) in zip(names, first, other, strict=True):
                is_number = math.isfinite(one_sum) or math.isfinite(other_sum)
                if is_number and not abs(one_sum - other_sum) <= _MOST_DIFFERENCE * size:
                    raise ReplicaDriftError(
                        f"the replicas have drifted apart: parameter {name!r} has not the same values on replicas 0 "
                        f"and {ordinal} at step {step}. Every replica must make the same update: step optimizers by "
                        "CrossShardOptimizer or xm.optimizer_step, and change weights in model_fn, not in a hook, "
                        "which sees the first replica alone.")


def _checksums(model: torch.nn.Module) -> Tensor:
    """Returns the sums of values and of sizes, float32 [number of parameters, 2], on the parameters' device."""
    values = [_real(parameter.detach()).float() for parameter in model.parameters()]
    return torch.stack([torch.stack([value.sum(), value.abs().sum()]) for value in values])


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
