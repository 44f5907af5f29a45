"""Plain PyTorch on the CPU of one process: the reference that needs no XLA, for `use_tpu=False`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from tpuspec.runtime.placement import module_as_before, move_module
from tpuspec.spec.backend import CompiledStep, Replica, RngState, StepFunction, Topology
from tpuspec.spec.results import Batch, StepOutput
from tpuspec.spec.train_op import reduce_with

T = TypeVar("T")


class NativeBackend:
    """One replica on the CPU; every step runs eagerly, in any shape."""

    static_shapes = False
    step_kind = "eager"

    def __init__(self) -> None:
        self.topology = Topology(
            platform="CPU", devices=("cpu",), num_replicas_per_host=1, reason="use_tpu=False: plain PyTorch")

    def place(self, model: nn.Module | None) -> list[Replica]:
        """Returns the one replica around the module itself, on the CPU."""
        if model is not None:
            move_module(model, torch.device("cpu"))
        return [Replica(ordinal=0, device=torch.device("cpu"), model=model,
                        global_step=torch.zeros(1, dtype=torch.int64))]

    def seed(self, seed: int) -> None:
        """Seeds torch's random state."""
        torch.manual_seed(seed)

    def rng_state(self) -> RngState:
        """Reads torch's random state."""
        return RngState(host=torch.get_rng_state())

    def set_rng_state(self, state: RngState) -> None:
        """Puts torch's random state back."""
        torch.set_rng_state(state.host)

    def feed(self, batches: Sequence[Batch]) -> list[Batch]:
        """Copies the tensors, as a transfer does: the input may use its memory again before the host half reads it."""
        return [batch.map(torch.clone) for batch in batches]

    def compile_step(self, step: StepFunction, replicas: Sequence[Replica]) -> CompiledStep:
        """Wraps the step; nothing is compiled."""
        return EagerStep(backend=self, step=step, replicas=tuple(replicas))

    def rehearse(self, replica: Replica, fn: Callable[[], T]) -> T:
        """Runs `fn`, then puts buffers and random state back."""
        random_state = self.rng_state()
        try:
            with module_as_before(replica.model):
                return fn()
        finally:
            self.set_rng_state(random_state)

    def fetch(self, tree: T) -> T:
        """Returns the structure: its tensors are on the host."""
        return tree

    def reduce_gradients(self, optimizer: torch.optim.Optimizer, reduction: str) -> None:
        """Applies the gradients; with one replica there is nothing to reduce."""
        optimizer.step()

    def gather(self, tensor: Tensor) -> Tensor:
        """Returns the tensor of the one replica."""
        return tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class EagerStep:
    """Runs the step at once."""

    backend: NativeBackend
    step: StepFunction
    replicas: tuple[Replica, ...]

    def __call__(self, batches: Sequence[Batch], micro_step: int = 0) -> list[StepOutput]:
        """Runs one step on each replica's batch."""
        with reduce_with(self.backend):
            return [self.step(replica, batch, micro_step)
                    for replica, batch in zip(self.replicas, batches, strict=True)]

    def publish(self) -> None:
        """State is always readable."""
