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

from tpuspec.errors import CaptureError
from tpuspec.spec.engine import Layout, Run
from tpuspec.spec.functions import user_place
from tpuspec.tracer import graph
from tpuspec.tracer.host_reads import HostReads
from tpuspec.tracer.layouts import of_sources
from tpuspec.tracer.on_engine import OnEngine, read_of_plan
from tpuspec.tracer.sources import Source

InputsOf = Callable[[Sequence[Source], Sequence[Tensor]], list[Any]]
"""From the sources of a graph's inputs, and their values in the trace, to what it is run with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """A number that a traced step read.

    Attributes:
      graph: hash of the compiled graph that computes it.
      runtime: runs it by `run`.
      inputs: where each input of the graph comes from.
      constants: inputs that are neither state, batch nor seed, by the number of their source.
      numbers: the constants on the host, for comparing.
      answer: the number, as text, in which NaN equals NaN and 0.0 does not equal -0.0.
      place: FILE:LINE of the user's code.
    """

    graph: bytes
    runtime: OnEngine
    run: Run
    inputs: tuple[Source, ...]
    constants: tuple[Any, ...]
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
        return all(value is not None for value in feed) and (
            _answer(self.runtime, self.run, feed)[1] == self.answer)


class GuardedReads:
    """Makes guards of the numbers that this thread reads from the device within the block.

    What depends on a number of an optimizer is computed likewise, and is no guard, as the number is another one in each
    step. What several replicas compute together is read as it would be without, and is noted by `reads`.

    Args:
      source_of: where an input of a graph comes from; None for a constant.
      reads: counts what is read.
      runtime: computes them.
      inputs_of: returns the inputs of a graph.
      of_batch: layouts of the batch's tensors.
      is_alone: whether there is one replica.

    Attributes:
      found: the guards.
      of_numbers: FILE:LINE of the reads that depend on an optimizer's numbers.
    """

    def __init__(self, source_of: Callable[[graph.GraphInput], Source | None], reads: HostReads,
                 runtime: OnEngine, inputs_of: InputsOf, of_batch: Sequence[Layout], *, is_alone: bool) -> None:
        self.found: list[Guard] = []
        self.of_numbers: list[str] = []
        self._source_of, self._reads, self._is_alone = source_of, reads, is_alone
        self._runtime, self._inputs_of, self._of_batch = runtime, inputs_of, of_batch

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
        """Returns the number of a tensor of one element; None where it cannot be a guard. The trace stays as it is.

        Raises:
          CaptureError: nothing runs that could compute it.
        """
        if not self._runtime.engine.has_values:
            raise read_of_plan(user_place(sys._getframe(1)))
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
                sources.append(source)
            values = [found.value for found in inputs]
            given = of_sources(self._runtime.layouts, sources, values, self._of_batch)
            compiled = self._runtime.compile([root], [], given, [self._runtime.layouts.of_output])
            value, answer = _answer(self._runtime, compiled.run, self._inputs_of(sources, values))
            place = user_place(sys._getframe(1))
            if any(source.kind == "number" for source in sources):
                self.of_numbers.append(place)
                return value
            self.found.append(Guard(
                graph=compiled.key, runtime=self._runtime, run=compiled.run, inputs=tuple(sources),
                constants=tuple(self._runtime.take(constants)), numbers=tuple(graph.fetch(constants)), answer=answer,
                place=place))
            return value


def _answer(runtime: OnEngine, run: Run, feed: Sequence[Any]) -> tuple[Any, str]:
    values = runtime.engine.fetch(run(feed))[0].reshape(-1).tolist()
    if any(repr(value) != repr(values[0]) for value in values):
        raise CaptureError(f"the replicas computed different graphs: the step reads {values} from them, and a branch "
                           "on it would differ. model_fn must do the same on every replica.")
    return values[0], f"{type(values[0]).__name__} {values[0]!r}"


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
