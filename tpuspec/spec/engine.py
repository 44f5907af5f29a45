"""What runs the programs that steps are traced into."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tpuspec.spec.pieces import Pieces, Stored

Run = Callable[[Sequence[Any]], Sequence[Any]]
"""run(inputs) -> outputs: starts a program and does not wait for it."""


class Layout(NamedTuple):
    """How a tensor lies on the devices: whole on each, unless it says otherwise.

    Attributes:
      is_own: whether every replica has one for itself: its rows, its seed, its statistics.
      axes: for each dim the axes of a mesh that it is split over.
      parts: for each dim of a batch into how many parts the cores of a replica split it; () for none.
    """

    is_own: bool = False
    axes: tuple[tuple[str, ...], ...] = ()
    parts: tuple[int, ...] = ()


CONSTRAINT = "tpuspec.constrain"
"""A custom call with one operand, whose layout it fixes."""

CONSTRAINT_AXES = "axes"
"""Its attribute: for each dim the names of the mesh axes that split it, as JSON."""

WHOLE = Layout()
OWN = Layout(is_own=True)


@dataclass(frozen=True, slots=True, eq=False)
class OfStep:
    """What one step of several leaves: a part of an array [number of steps, ...]."""

    array: Any
    step: int

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.array.__array__(*args, **kwargs)[self.step]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledFacts:
    """What a compiler says of a program, for one device.

    Attributes:
      argument_bytes: of each input.
      output_bytes: of all outputs, those that lie where inputs lay included.
      aliased_bytes: of these.
      temporary_bytes: besides inputs and outputs, while it runs.
      program_bytes: of its code.
      flops: arithmetic operations.
      accessed_bytes: that it reads and writes in memory.
      collectives: kind -> (how many, bytes of their results).
      seconds: that compiling took.
      temporaries: the largest results of operations that are no outputs, (what, bytes).
      reason: why it does not compile; "" where it does.
      place: FILE:LINE of the code that asks for what is refused; "" where that is not known.
    """

    argument_bytes: list[int]
    output_bytes: int = 0
    aliased_bytes: int = 0
    temporary_bytes: int = 0
    program_bytes: int = 0
    flops: float = 0.0
    accessed_bytes: float = 0.0
    collectives: dict[str, tuple[int, int]] = field(default_factory=dict)
    seconds: float = 0.0
    temporaries: list[tuple[str, int]] = field(default_factory=list)
    reason: str = ""
    place: str = ""


class Engine(Protocol):
    """Devices with what they hold, as arrays of their own kind.

    With several replicas one program runs on all of them. What each replica has for itself is an array
    [num_replicas, ...]; the rest is whole, and equal on all of them. On a mesh one program computes with the rows of
    all replicas, as on one device, and its tensors lie as their layouts say.

    Attributes:
      num_replicas: of a program; 1 on a mesh.
      num_devices: of all processes.
      batches_are_outputs: whether inputs of `of_batches` may be fetched as outputs are.
      splits_state: whether whole tensors of state need not lie in one process.
      has_values: whether programs run; else arrays are shapes, and programs are compiled only.
    """

    has_values: bool
    num_replicas: int
    num_devices: int
    batches_are_outputs: bool
    splits_state: bool

    def put(self, tensors: Sequence[Tensor], layouts: Sequence[Layout] | None = None) -> list[Any]:
        """Copies host tensors to the devices; every replica gets a copy of those that are its own.

        Args:
          tensors: of one replica.
          layouts: of each; None for whole ones.
        """
        ...

    def put_stacked(self, tensors: Sequence[Tensor]) -> list[Any]:
        """Copies host tensors [num_replicas, ...] to the devices, to each replica its own."""
        ...

    def put_numbers(self, numbers: Sequence[Any], dtypes: Sequence[torch.dtype]) -> list[Any]:
        """Copies numbers, or lists of them, into inputs that are whole."""
        ...

    def of_batches(self, batches: Sequence[Sequence[Tensor]], layouts: Sequence[Layout]) -> list[Any]:
        """Copies the tensors of this process's replicas into inputs for one run.

        Args:
          batches: for each replica its tensors; for a mesh one batch, of all of them.
          layouts: of each tensor.
        """
        ...

    def of_steps(self, steps: Sequence[Sequence[Sequence[Tensor]]], layouts: Sequence[Layout],
                 ) -> tuple[list[Any], list[list[Any]]]:
        """Copies the batches of several steps, of one form, into inputs of one run.

        Args:
          steps: for each step its batches, as in `of_batches`.
          layouts: of each tensor of a step.

        Returns:
          The inputs, [len(steps), ...] each; and for each step its arrays, as `of_batches` returns them.
        """
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

    def fetch_pieces(self, arrays: Sequence[Any]) -> list[Tensor | Pieces]:
        """Copies to the host what this process has of arrays, which are no replica's own; asks no other process.

        Returns:
          Tensors of those that it has whole; of the others its pieces, each of them in one process only.
        """
        ...

    def put_stored(self, stored: Sequence[Stored], dtypes: Sequence[torch.dtype], layouts: Sequence[Layout],
                   ) -> list[Any]:
        """Reads from a checkpoint what the devices of this process take, and sends it there.

        Args:
          stored: tensors of the checkpoint.
          dtypes: of the arrays.
          layouts: of the arrays, which are no replica's own.
        """
        ...

    def compile(self, program: bytes, donated: Sequence[int], given: Sequence[Layout], made: Sequence[Layout],
                num_kept: int = 0) -> Run:
        """Compiles a StableHLO program.

        Args:
          program: of one replica, a portable artifact.
          donated: places of the inputs whose buffers the program may write its outputs to; they are gone then.
          given: layout of each input.
          made: of each output.
          num_kept: outputs, the first ones, that stay on the devices; the host of the chief reads the others.
        """
        ...

    def compile_loop(self, program: bytes, num_steps: int, carried: Sequence[tuple[int, int]], stacked: Sequence[int],
                     given: Sequence[Layout], made: Sequence[Layout]) -> Run | None:
        """Compiles a program that runs another one several times.

        Args:
          program: one step, a portable artifact.
          num_steps: how often it runs.
          carried: (input, output) of the state; its outputs are the first ones.
          stacked: places of the inputs that are [num_steps, ...]; the others are the same in all steps.
          given: layout of each input of a step.
          made: of each output.

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


class EngineFactory(Protocol):
    """The devices of a platform, those of all processes that have joined."""

    def num_devices(self) -> int:
        """Counts those of this process."""
        ...

    def make(self, num_replicas: int) -> Engine:
        """Returns the engine of so many replicas of each process, a device each."""
        ...

    def make_mesh(self, axes: Mapping[str, int], parts: Sequence[Sequence[int]]) -> Engine:
        """Returns the engine of a mesh of all devices.

        Args:
          axes: mesh axis -> its size.
          parts: into which the cores of a replica split dims of batches.
        """
        ...
