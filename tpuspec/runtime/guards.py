"""Values that a step reads while it is traced, as `if tensor:` does: computed anew before each replay.

A replay takes the branches that its trace took. Each number that Python code read there is a guard: a small graph of
its own over what the step starts from, which must give the same number again before the step is replayed.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpuspec.runtime import graph
from tpuspec.runtime.host_reads import HostReads
from tpuspec.runtime.sources import Source
from tpuspec.spec.functions import user_place


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """A number that a traced step read.

    Attributes:
      graph: hash of the compiled graph that computes it.
      inputs: where each input of the graph comes from.
      constants: inputs that are neither state, batch nor seed, by the number of their source.
      numbers: the constants on the host, for comparing.
      answer: the number, as text, in which NaN equals NaN and 0.0 does not equal -0.0.
      place: FILE:LINE of the user's code.
    """

    graph: bytes
    inputs: tuple[Source, ...]
    constants: tuple[Tensor, ...]
    numbers: tuple[Tensor, ...]
    answer: str
    place: str

    def equals(self, other: Guard) -> bool:
        """Whether both compute the same from the same, and had the same answer."""
        return (self.graph, self.inputs, self.answer) == (other.graph, other.inputs, other.answer) and all(
            map(torch.equal, self.numbers, other.numbers))

    def holds(self, values: Mapping[str, Callable[[Any], Any]]) -> bool:
        """Whether the answer is the same for other inputs; waits for them.

        Args:
          values: kind of a source -> its value by the source's key.
        """
        feed = [self.constants[source.key] if source.kind == "constant" else values[source.kind](source.key)
                for source in self.inputs]
        return all(value is not None for value in feed) and _answer(self.graph, feed)[1] == self.answer


class GuardedReads:
    """Makes guards of the numbers that this thread reads from the device within the block.

    What cannot be a guard is read as it would be without, and is noted by `reads`: what depends on a number of an
    optimizer, and on several replicas what they compute together, for one would wait for the others.

    Args:
      source_of: where an input of a graph comes from; None for a constant.
      reads: counts what is read.
      is_alone: whether there is one replica.
    """

    def __init__(self, source_of: Callable[[graph.GraphInput], Source | None], reads: HostReads, *,
                 is_alone: bool) -> None:
        self.found: list[Guard] = []
        self._source_of, self._reads, self._is_alone = source_of, reads, is_alone

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """See the class."""
        _intercept()
        _of_thread.newest = self
        try:
            yield
        finally:
            _of_thread.newest = None

    def read(self, tensor: Tensor) -> Any:
        """Returns the number of a tensor of one element; None where it cannot be a guard. The trace stays as it is."""
        with self._reads.passed_over():
            root = graph.computed(tensor)
            if not self._is_alone and graph.has_collectives([root]):
                return None
            inputs = graph.graph_inputs([root])
            constants: list[Tensor] = []
            sources: list[Source] = []
            for found in inputs:
                source = self._source_of(found)
                if source is None:
                    source = Source("constant", len(constants))
                    constants.append(found.value)
                elif source.kind == "number":
                    return None
                sources.append(source)
            compiled = graph.compile_graph([root])
            value, answer = _answer(compiled, [found.value for found in inputs])
            self.found.append(Guard(
                graph=compiled, inputs=tuple(sources), constants=tuple(constants),
                numbers=tuple(graph.fetch(constants)), answer=answer, place=user_place(sys._getframe(1))))
            return value


def _answer(compiled: bytes, feed: Sequence[Tensor]) -> tuple[Any, str]:
    value = graph.fetch(graph.run(compiled, list(feed)))[0].item()
    return value, f"{type(value).__name__} {value!r}"


class _OfThread(threading.local):
    newest: GuardedReads | None = None


_of_thread = _OfThread()


@functools.cache
def _intercept() -> torch.library.Library:
    """Puts itself before torch_xla's reading of one number, for the whole process: `item`, `bool`, `int`, `float`."""
    kernel = torch.library.get_kernel("aten::_local_scalar_dense", "XLA")

    def read(keys: torch._C.DispatchKeySet, tensor: Tensor) -> Any:
        guards = _of_thread.newest
        value = guards.read(tensor) if guards is not None else None
        return kernel.call_boxed(keys, tensor) if value is None else value

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the override
        library.impl("_local_scalar_dense", read, "XLA", with_keyset=True, allow_override=True)
    return library
