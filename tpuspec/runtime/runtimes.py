"""What runs traced graphs: an engine, or, for meshes, pods and steps that read the device, torch_xla's own runtime."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from tpuspec.runtime import graph
from tpuspec.runtime.sent_batch import SentBatch
from tpuspec.spec.engine import Engine, Run
from tpuspec.spec.results import Batch

_MAX_COMPILED = 128

SEED_OF_REPLICA = 0x9E3779B97F4A7C15
"""Replica i draws with seed + i times this, so that no two of them drop the same units; replica 0 as one device."""


class CompiledGraph(NamedTuple):
    """A compiled graph.

    Attributes:
      key: equal for graphs that compute the same from the same inputs.
      run: starts it and does not wait.
      program: for an engine, a portable artifact; b"" on torch_xla's own runtime.
    """

    key: bytes
    run: Run
    program: bytes = b""


class Runtime(Protocol):
    """Compiles graphs, and makes their inputs from tensors."""

    def donate(self, values: Sequence[Tensor]) -> None:
        """Says before a graph is compiled which inputs it may write its outputs to."""
        ...

    def compile(self, roots: Sequence[Tensor], donated: Sequence[int], given: Sequence[bool], made: Sequence[bool],
                ) -> CompiledGraph:
        """Compiles the graph behind pending tensors, unless it is known.

        Args:
          roots: what it computes.
          donated: places of the inputs that were named to `donate`.
          given: for each input whether it is every replica's own.
          made: for each root.
        """
        ...

    def take(self, values: Sequence[Tensor], own: Sequence[bool] | None = None) -> list[Any]:
        """Returns inputs of the same values as device tensors; `own` says which are every replica's own."""
        ...

    def put(self, tensors: Sequence[Tensor], device: str) -> list[Any]:
        """Returns inputs of the values of host tensors."""
        ...

    def fetch(self, values: Sequence[Any]) -> list[Tensor]:
        """Copies outputs to the host; waits for them."""
        ...

    def of_batch(self, batch: Batch) -> list[Any]:
        """Returns the tensors of a batch as inputs."""
        ...

    def seed(self, seed: int, device: str) -> Any:
        """Returns a random seed as an input."""
        ...

    def num_compiles(self) -> int:
        """Counts the graphs that were compiled."""
        ...


class OnTorchXla:
    """torch_xla's own runtime: its tensors are inputs and outputs."""

    def donate(self, values: Sequence[Tensor]) -> None:
        graph.donate(values)

    def compile(self, roots: Sequence[Tensor], donated: Sequence[int], given: Sequence[bool], made: Sequence[bool],
                ) -> CompiledGraph:
        """Compiles a graph; what is donated its inputs say themselves."""
        key = graph.compile_graph(roots)
        return CompiledGraph(key, functools.partial(graph.run, key))

    def take(self, values: Sequence[Tensor], own: Sequence[bool] | None = None) -> list[Any]:
        return list(values)

    def put(self, tensors: Sequence[Tensor], device: str) -> list[Any]:
        return graph.send(tensors, device)

    def fetch(self, values: Sequence[Any]) -> list[Tensor]:
        return graph.fetch(values)

    def of_batch(self, batch: Batch) -> list[Any]:
        return batch.tensors()

    def seed(self, seed: int, device: str) -> Any:
        return graph.seed_value(seed, device)

    def num_compiles(self) -> int:
        return graph.num_compiles()


class OnEngine:
    """An engine runs what torch_xla traces; its arrays are inputs and outputs.

    Args:
      engine: runs StableHLO programs.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._compiled: OrderedDict[tuple[Any, ...], CompiledGraph] = OrderedDict()

    def donate(self, values: Sequence[Tensor]) -> None:
        """An engine is told by their places."""

    def compile(self, roots: Sequence[Tensor], donated: Sequence[int], given: Sequence[bool], made: Sequence[bool],
                ) -> CompiledGraph:
        """Compiles a graph; the newest ones are kept by what they compute."""
        key = (graph.graph_hash(roots), tuple(donated), tuple(given), tuple(made))
        compiled = self._compiled.pop(key, None)
        if compiled is None:
            program = graph.stablehlo(roots)
            compiled = CompiledGraph(key[0], self.engine.compile(program, donated, given, made), program)
        self._compiled[key] = compiled
        while len(self._compiled) > _MAX_COMPILED:
            self._compiled.popitem(last=False)
        return compiled

    def take(self, values: Sequence[Tensor], own: Sequence[bool] | None = None) -> list[Any]:
        return self.engine.put(graph.fetch(values), own)

    def put(self, tensors: Sequence[Tensor], device: str) -> list[Any]:
        return self.engine.put(tensors)

    def fetch(self, values: Sequence[Any]) -> list[Tensor]:
        return self.engine.fetch(values)

    def of_batch(self, batch: Batch) -> list[Any]:
        assert isinstance(batch, SentBatch), "made by feed"
        return batch.arrays()

    def seed(self, seed: int, device: str) -> Any:
        return self.engine.own([np.array((seed + ordinal * SEED_OF_REPLICA) % (1 << 64), np.uint64).view(np.int64)
                                for ordinal in range(self.engine.num_replicas)])

    def num_compiles(self) -> int:
        return self.engine.num_compiles
