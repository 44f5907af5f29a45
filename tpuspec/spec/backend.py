"""The seam between the loops and a device runtime: three verbs outside the step, two inside it, and the topology."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from tpuspec.spec.coordinator import Coordinator
from tpuspec.spec.pieces import Stored
from tpuspec.spec.results import Batch, StepOutput

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Who computes.

    Attributes:
      platform: 'TPU', 'CPU', 'CUDA'.
      devices: names of this host's devices.
      num_replicas_per_host: model copies of one host; fewer than devices where a copy spans several.
      num_hosts: processes with devices.
      host_index: this process among them.
      reason: why this platform was chosen, for the banner.
      mesh: mesh axis -> its size, where XLA splits tensors over a mesh (SPMD).
      replicas_per_program: replicas whose rows one program computes: 1, or under SPMD all of them.
    """

    platform: str
    devices: tuple[str, ...]
    num_replicas_per_host: int
    num_hosts: int = 1
    host_index: int = 0
    reason: str = ""
    mesh: Mapping[str, int] = field(default_factory=dict)
    replicas_per_program: int = 1

    @property
    def num_replicas(self) -> int:
        """Model copies over all hosts."""
        return self.num_replicas_per_host * self.num_hosts

    @property
    def is_chief(self) -> bool:
        """Whether this host writes checkpoints and summaries."""
        return self.host_index == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RngState:
    """Random state.

    Attributes:
      host: torch's on the CPU, uint8 [bytes].
      devices: seed of each local device; empty where the host's is all.
    """

    host: Tensor
    devices: tuple[int, ...] = ()


@dataclass(slots=True, kw_only=True)
class Replica:
    """One model copy and its training state on one device.

    Attributes:
      ordinal: its number among all replicas.
      device: its device.
      model: the module; None where the Trainer has none.
      optimizers: by name; one unnamed optimizer has the name ''.
      global_step: int64 [1] on the device; completed updates.
    """

    ordinal: int
    device: torch.device
    model: nn.Module | None
    global_step: Tensor
    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)


StepFunction = Callable[[Replica, Batch, int], StepOutput]
"""One step of one replica, in terms of device tensors only; the int is the batch's number within an update, 0 unless
gradients accumulate."""


class CompiledStep(Protocol):
    """A step made ready to run on every local replica."""

    def __call__(self, batches: Sequence[Batch], micro_step: int = 0) -> list[StepOutput]:
        """Dispatches one step on device batches, one a local replica; does not wait for it.

        Args:
          batches: as `Backend.feed` returned them.
          micro_step: number of these batches within an update, while gradients accumulate.
        """
        ...

    def publish(self, *, readable: bool = True) -> None:
        """Gives the newest state back to modules and optimizers; called at every loop boundary.

        Args:
          readable: whether somebody reads their tensors then; else only `Backend.fetch` and `SplitState` may.
        """
        ...


@runtime_checkable
class RunsSeveral(Protocol):
    """A compiled step of which several may run as one program."""

    @property
    def num_at_once(self) -> int:
        """Steps that `run_several` takes now; 1 where they run one at a time."""
        ...

    @property
    def num_replays_ahead(self) -> int:
        """Steps that will not be traced, if nothing happens meanwhile; 0 where that is not known."""
        ...

    def feed_several(self, batches: Sequence[Sequence[Batch]]) -> list[list[Batch]]:
        """As `Backend.feed`, for each of several steps."""
        ...

    def run_several(self, batches: Sequence[Sequence[Batch]], after_each: Callable[[], None],
                    ) -> list[list[StepOutput]] | None:
        """Dispatches `num_at_once` steps as one program; does not wait for it.

        Args:
          batches: for each step the device batches, one a local replica.
          after_each: called once a step, behind the reading of its learning rates: it sets those of the next one.

        Returns:
          For each step the outputs, one a local replica; None where the steps turn out to need programs of their own,
          after `after_each` was called for all of them, and none was dispatched.
        """
        ...


class SplitState(Protocol):
    """State of which no host has the whole: each reads and writes its pieces."""

    def fetch_pieces(self, tree: Any) -> Any:
        """As `Backend.fetch`, but tensors that are split over hosts come as `Pieces`; asks no other host."""
        ...

    def like_stored(self, stored: Sequence[Stored], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """Returns tensors of those shapes without values, for `take_stored`: reading one before is an error."""
        ...

    def take_stored(self, replica: Replica, pairs: Sequence[tuple[Tensor, Stored]]) -> None:
        """Gives tensors of the state values of a checkpoint, of which each host reads what it needs."""
        ...


class Backend(Protocol):
    """A device runtime.

    Attributes:
      topology: who computes.
      coordinator: what the hosts decide together.
      static_shapes: whether every batch must have one shape, so that short batches are padded.
      split_state: reads and writes a state that no host has whole; None where every host has it.
      step_kind: how steps run, for the progress line: 'to be captured' before the first, 'traced', 'replay' or 'eager'.
    """

    @property
    def topology(self) -> Topology: ...

    @property
    def coordinator(self) -> Coordinator: ...

    @property
    def static_shapes(self) -> bool: ...

    @property
    def step_kind(self) -> str: ...

    @property
    def split_state(self) -> SplitState | None: ...

    def place(self, model: nn.Module | None) -> list[Replica]:
        """Puts one copy of a host module on each local device; tied parameters stay tied."""
        ...

    def seed(self, seed: int) -> None:
        """Seeds the random state of host and devices."""
        ...

    def rng_state(self) -> RngState:
        """Reads the random state of host and devices."""
        ...

    def set_rng_state(self, state: RngState) -> None:
        """Puts a random state back."""
        ...

    def feed(self, batches: Sequence[Batch]) -> list[Batch]:
        """Sends host batches, one a local replica, to the devices."""
        ...

    def compile_step(self, step: StepFunction, replicas: Sequence[Replica], *, num_at_once: int = 1) -> CompiledStep:
        """Makes a step ready to run; tracing and compiling may wait until it is called.

        Args:
          step: the step of one replica.
          replicas: the local replicas.
          num_at_once: training steps that may be one program, of a step that then is `RunsSeveral`.
        """
        ...

    def rehearse(self, replica: Replica, fn: Callable[[], T]) -> T:
        """Traces `fn` on a replica without running it: buffers and random state are as before afterwards."""
        ...

    def fetch(self, tree: T) -> T:
        """Copies every device tensor of a nested structure to the host, in as few transfers as serve it."""
        ...

    def keeping_statistics(self, *, whole: bool) -> contextlib.AbstractContextManager[None]:
        """Gives the replicas of a program their own buffers back at the end of a block.

        Args:
          whole: whether they all have the mean of them within it, as the module and checkpoints do.
        """
        ...

    def statistics(self) -> dict[str, Tensor]:
        """Returns the buffers of a program's replicas by name, [replicas, ...]; nothing where there is one of all."""
        ...

    def set_statistics(self, replica: Replica, statistics: Mapping[str, Tensor]) -> None:
        """Gives the replicas of a program their own buffers, unless they are of another number of replicas."""
        ...

    def sums_of_parameters(self, replicas: Sequence[Replica]) -> list[Tensor]:
        """Returns for each local replica the sums of values and of sizes, float32 [number of parameters, 2]."""
        ...

    def reduce_gradients(self, optimizer: torch.optim.Optimizer, reduction: str) -> None:
        """Inside a step: reduces the gradients over all replicas and applies them (`xm.optimizer_step`)."""
        ...

    def constrain(self, tensor: Tensor, axes: Sequence[Any]) -> Tensor:
        """Inside a step: fixes how a tensor lies on a mesh; without one returns it as it is."""
        ...

    def gather(self, tensor: Tensor) -> Tensor:
        """Inside a step: concatenates a tensor over all replicas along axis 0, in replica order."""
        ...
