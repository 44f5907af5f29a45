"""Replicas that part: their weights are compared at loop boundaries, every so often."""

from __future__ import annotations

import math
from dataclasses import dataclass

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

    @property
    def compares(self) -> bool:
        """Whether there are several replicas."""
        topology = self.session.backend.topology
        return topology.num_replicas > topology.replicas_per_program

    def at_boundary(self, step: int) -> None:
        """Compares, if it is time; waits for the devices then.

        Args:
          step: global step of the state that modules hold now.

        Raises:
          ReplicaDriftError: a parameter differs; it names the first one.
        """
        session = self.session
        if not self.compares or session.module is None or next(session.module.parameters(), None) is None:
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
        own = session.backend.sums_of_parameters(session.replicas)
        found = session.backend.coordinator.exchange([sums.tolist() for sums in own], name="sums of the parameters")
        (first, *others) = [replica for host in found for replica in host]
        names = [name for name, _ in session.module.named_parameters()]
        for ordinal, other in enumerate(others, start=1):
            for name, of_one, of_other in zip(names, first, other, strict=True):
                # The sizes too: of a last layer the sum stays, as gradients of a cross entropy add up to 0.
                if any(_differ(own, its, of_one[1]) for own, its in zip(of_one, of_other, strict=True)):
                    raise ReplicaDriftError(
                        f"the replicas have drifted apart: parameter {name!r} has not the same values on replicas 0 "
                        f"and {ordinal} at step {step}. Every replica must make the same update: step optimizers by "
                        "CrossShardOptimizer or xm.optimizer_step: what a train_op writes without one "
                        "comes of its own replica's rows.")


def _differ(one: float, other: float, size: float) -> bool:
    is_number = math.isfinite(one) or math.isfinite(other)
    return is_number and not abs(one - other) <= _MOST_DIFFERENCE * size
