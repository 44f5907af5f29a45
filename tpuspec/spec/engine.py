"""What runs the programs that steps are traced into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

Run = Callable[[Sequence[Any]], Sequence[Any]]
"""run(inputs) -> outputs: starts a program and does not wait for it."""


@dataclass(frozen=True, slots=True, eq=False)
class OfStep:
    """What one step of several leaves: a part of an array [number of steps, ...]."""

    array: Any
    step: int

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.array.__array__(*args, **kwargs)[self.step]


class Engine(Protocol):
    """Devices with what they hold, as arrays of their own kind.

    With several replicas one program runs on all of them. What each replica has for itself (its rows, its seed, its
    statistics) is an array [num_replicas, ...]; the rest is whole, and equal on all of them.

    Attributes:
      num_replicas: of a program.
    """

    num_replicas: int

    def put(self, tensors: Sequence[Tensor], own: Sequence[bool] | None = None) -> list[Any]:
        """Copies host tensors to the devices.

        Args:
          tensors: of one replica.
          own: for each whether every replica has it for itself: it gets a copy.
        """
        ...

    def of_batches(self, batches: Sequence[Sequence[Tensor]]) -> list[Any]:
        """Copies the tensors of the replicas' batches into inputs, for one run."""
        ...

    def own(self, values: Sequence[Any]) -> Any:
        """Returns an input that is every replica's own, of one number each."""
        ...

    def stack(self, arrays: Sequence[Any]) -> Any:
        """Returns inputs of several steps as one, [len(arrays), ...]."""
        ...

    def fetch(self, arrays: Sequence[Any]) -> list[Tensor]:
        """Copies arrays, and those `OfStep`, to the host; waits for the programs that compute them."""
        ...

    def fetch_whole(self, arrays: Sequence[Any]) -> list[Tensor]:
        """As `fetch`, for one replica: of what each has for itself the mean, or the first one's whole numbers."""
        ...

    def compile(self, program: bytes, donated: Sequence[int], given: Sequence[bool], made: Sequence[bool]) -> Run:
        """Compiles a StableHLO program.

        Args:
          program: of one replica, a portable artifact.
          donated: places of the inputs whose buffers the program may write its outputs to; they are gone then.
          given: for each input whether it is every replica's own.
          made: for each output.
        """
        ...

    def compile_loop(self, program: bytes, num_steps: int, carried: Sequence[tuple[int, int]], stacked: Sequence[int],
                     given: Sequence[bool], made: Sequence[bool]) -> Run | None:
        """Compiles a program that runs another one several times.

        Args:
          program: one step, a portable artifact.
          num_steps: how often it runs.
          carried: (input, output) of the state.
          stacked: places of the inputs that are [num_steps, ...]; the others are the same in all steps.
          given: for each input of a step whether it is every replica's own.
          made: for each output.

        Returns:
          A function from the inputs to the outputs: the state after the last step, the others [num_steps, ...]. None
          where the steps had better run one at a time.
        """
        ...

    def sums(self, arrays: Sequence[Any]) -> Tensor:
        """Returns for each replica the sums of values and of sizes of arrays, float32 [num_replicas, arrays, 2]."""
        ...

    @property
    def num_compiles(self) -> int:
        """Programs that this process has compiled."""
        ...


class Engines(Protocol):
    """The devices of a platform on this host."""

    def num_devices(self) -> int:
        """Counts them."""
        ...

    def make(self, num_replicas: int) -> Engine:
        """Returns the engine of so many replicas, a device each."""
        ...
