"""The state of a replica between replayed steps, when modules and optimizers do not hold it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tpuspec.runtime import graph
from tpuspec.runtime.recording import Before
from tpuspec.runtime.slots import GRADIENT, Slot, gradient_owners
from tpuspec.spec.backend import Replica


class ReplicaState:
    """One replica's state while its steps are replayed.

    Attributes:
      replica: the replica.
      values: number of a slot -> its newest value.
      seed: of the next step.
    """

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.device = str(replica.device)
        self.values: list[Any] = []
        self.seed = 0
        self._tensors: dict[Slot, Tensor] = {}

    def adopt(self, numbers: dict[Slot, int]) -> None:
        """Takes the state over from module and optimizers."""
        before = Before(self.replica, is_traced=False)
        self._tensors = before.slots
        for slot in before.slots:
            numbers.setdefault(slot, len(numbers))
        self.values = [None] * len(numbers)
        for slot, value in before.inner.items():
            self.values[numbers[slot]] = value
        self.seed = graph.get_seed(self.device)

    def publish(self, numbers: dict[Slot, int], written: set[int]) -> None:
        """Gives the newest values back to module and optimizers."""
        owners = gradient_owners(self.replica)
        for slot, number in numbers.items():
            if number not in written or number >= len(self.values):
                continue
            value = self.values[number]
            if slot.kind == GRADIENT:
                owners[slot].grad = value
            else:
                graph.publish(self._tensors[slot], graph.inner(value))
        graph.set_seed(self.seed, self.device)
        self.values = []

    def forget(self) -> None:
        """Drops the references to the state's buffers."""
        self.values, self._tensors = [], {}
