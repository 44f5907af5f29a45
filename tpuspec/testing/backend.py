"""Several replicas on the CPU without XLA: for tests of loops, input and host functions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tpuspec.errors import SpecUsageError
from tpuspec.native.backend import NativeBackend
from tpuspec.spec.backend import CompiledStep, Replica, StepFunction, Topology
from tpuspec.spec.results import Batch, StepOutput
from tpuspec.spec.train_op import reduce_with

T = TypeVar("T")


class FakeBackend(NativeBackend):
    """Runs each replica's step eagerly, one replica after the other, and remembers what it was asked for.

    A replica's step is over before the next one's begins, so nothing can be exchanged within a step: with several
    replicas evaluation and prediction work, and training is refused. One replica trains.

    Args:
      num_replicas: model copies.
      static_shapes: whether short batches are padded, as on XLA.

    Attributes:
      events: names of the verbs in the order of their calls: 'seed', 'place', 'feed', 'step', 'publish', 'fetch',
        'rehearse', 'reduce_gradients', 'close'.
      fed: the host batches of each feed, one a replica.
      fetched: what each fetch returned.
    """

    step_kind = "eager"

    def __init__(self, num_replicas: int = 2, static_shapes: bool = True) -> None:
        self.topology = Topology(platform="CPU", devices=tuple(f"fake:{i}" for i in range(num_replicas)),
                                 num_replicas_per_host=num_replicas, reason="a fake for tests")
        self.static_shapes = static_shapes
        self.events: list[str] = []
        self.fed: list[list[Batch]] = []
        self.fetched: list[Any] = []

    def place(self, model: nn.Module | None) -> list[Replica]:
        """Returns the replicas: the first holds the module itself, the others copies."""
        self.events.append("place")
        return [Replica(ordinal=i, device=torch.device("cpu"), model=copy.deepcopy(model) if i else model,
                        global_step=torch.zeros(1, dtype=torch.int64))
                for i in range(self.topology.num_replicas)]

    def seed(self, seed: int) -> None:
        self.events.append("seed")
        super().seed(seed)

    def feed(self, batches: Sequence[Batch]) -> list[Batch]:
        """Copies the batches, as a transfer does: what the input does to its own later does not show."""
        self.events.append("feed")
        self.fed.append(list(batches))
        return [batch.map(torch.clone) for batch in batches]

    def compile_step(self, step: StepFunction, replicas: Sequence[Replica], *, num_at_once: int = 1) -> CompiledStep:
        return _FakeStep(backend=self, step=step, replicas=tuple(replicas))

    def rehearse(self, replica: Replica, fn: Callable[[], T]) -> T:
        self.events.append("rehearse")
        return super().rehearse(replica, fn)

    def fetch(self, tree: T) -> T:
        """Copies the tensors, as a transfer does."""
        self.events.append("fetch")
        copied = pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)
        self.fetched.append(copied)
        return copied

    def reduce_gradients(self, optimizer: torch.optim.Optimizer, reduction: str) -> None:
        """Applies the gradients of the one replica.

        Raises:
          SpecUsageError: there are several.
        """
        self._check_alone("reduce gradients")
        self.events.append("reduce_gradients")
        optimizer.step()

    def gather(self, tensor: Tensor) -> Tensor:
        """Returns the tensor of the one replica.

        Raises:
          SpecUsageError: there are several.
        """
        self._check_alone("gather")
        return tensor

    def _check_alone(self, verb: str) -> None:
        if self.topology.num_replicas > 1:
            raise SpecUsageError(f"FakeBackend runs its {self.topology.num_replicas} replicas one after the other and "
                                 f"cannot {verb} over them. Use FakeBackend(num_replicas=1), or real replicas.")


@dataclass(frozen=True, slots=True, kw_only=True)
class _FakeStep:
    backend: FakeBackend
    step: StepFunction
    replicas: tuple[Replica, ...]

    def __call__(self, batches: Sequence[Batch], micro_step: int = 0) -> list[StepOutput]:
        self.backend.events.append("step")
        with reduce_with(self.backend):
            return [self.step(replica, batch, micro_step)
                    for replica, batch in zip(self.replicas, batches, strict=True)]

    def publish(self, *, readable: bool = True) -> None:
        self.backend.events.append("publish")
