"""An engine runs the graphs that torch_xla traces; its arrays are their inputs and outputs."""

from __future__ import annotations

import contextlib
import functools
import traceback
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from tpuspec.errors import CaptureError
from tpuspec.spec.engine import Engine, Layout, Run
from tpuspec.spec.functions import is_user_frame
from tpuspec.tracer import graph
from tpuspec.tracer.host_reads import new_host_op, told_host_op
from tpuspec.tracer.layouts import Layouts
from tpuspec.tracer.operation_names import names_written, operations_named

_MAX_COMPILED = 128

SEED_OF_REPLICA = 0x9E3779B97F4A7C15
"""Replica i draws with seed + i times this, so that no two of them drop the same units; replica 0 as one device."""


class CompiledGraph(NamedTuple):
    """A compiled graph.

    Attributes:
      key: equal for graphs that compute the same from the same inputs.
      run: starts it and does not wait.
      program: a portable artifact; b"" where torch_xla's own runtime runs it.
    """

    key: bytes
    run: Run
    program: bytes = b""


class OnEngine:
    """Compiles graphs for an engine, and makes their inputs.

    Args:
      engine: runs StableHLO programs.
      layouts: of the tensors of a step.
    """

    def __init__(self, engine: Engine, layouts: Layouts) -> None:
        self.engine, self.layouts = engine, layouts
        self._compiled: OrderedDict[tuple[Any, ...], CompiledGraph] = OrderedDict()

    def compile(self, roots: Sequence[Tensor], donated: Sequence[int], given: Sequence[Layout],
                made: Sequence[Layout], num_kept: int = 0) -> CompiledGraph:
        """Compiles the graph of pending tensors, unless it is known; the newest ones are kept by what they compute.

        Args:
          roots: what it computes.
          donated, given, made, num_kept: as in `Engine.compile`.
        """
        key = (graph.graph_hash(roots), tuple(donated), tuple(given), tuple(made), num_kept)
        compiled = self._compiled.pop(key, None)
        if compiled is None:
            with contextlib.nullcontext() if self.engine.has_values else names_written():
                program = graph.stablehlo(roots)
            compiled = CompiledGraph(key[0], self.engine.compile(program, donated, given, made, num_kept), program)
        self._compiled[key] = compiled
        while len(self._compiled) > _MAX_COMPILED:
            self._compiled.popitem(last=False)
        return compiled

    def send(self, tensors: Sequence[Tensor], device: str) -> list[Tensor]:
        """Copies host tensors to the device that traces, each into a buffer of its own."""
        return graph.send_apart(tensors, device) if self.engine.has_values else graph.placeholders(tensors, device)

    def settle(self, tensors: Sequence[Tensor], device: str) -> None:
        """Gives tensors that are still to be computed their values."""
        waiting = graph.waiting(tensors)
        if self.engine.has_values:
            graph.materialize(waiting, device)
        else:
            _empty(waiting, device)

    def part(self, tensors: Sequence[Tensor], device: str) -> None:
        """Gives every tensor a buffer of its own: a clone shares its original's until one of them is written."""
        seen: set[int] = set()
        for tensor, handle in zip(tensors, graph.handles(tensors), strict=True):
            if handle in seen and self.engine.has_values:
                graph.publish(tensor, graph.inner(graph.send_copy(tensor, device)))
            elif handle in seen:
                _empty([tensor], device)
            seen.add(handle)

    def make_gone(self, like: Sequence[Tensor], device: str) -> list[Tensor]:
        """Returns tensors of the shapes and dtypes of others that nobody can read."""
        return graph.make_gone(like, device) if self.engine.has_values else graph.placeholders(like, device)

    def tracing(self) -> contextlib.AbstractContextManager[None]:
        """Where no program runs, refuses to read a value within the block.

        Raises:
          CaptureError: the block reads one.
        """
        return contextlib.nullcontext() if self.engine.has_values else graph.nothing_runs(
            functools.partial(_told, graph.host_ops()))

    def naming(self, model: nn.Module | None) -> contextlib.AbstractContextManager[None]:
        """Where no program runs, gives the operations of the block the names of modules and lines of code."""
        return contextlib.nullcontext() if self.engine.has_values else operations_named(model)

    def take(self, values: Sequence[Tensor], layouts: Sequence[Layout] | None = None) -> list[Any]:
        """Returns inputs of the values of tensors on the device that traces; whole ones without layouts."""
        return self.engine.put(graph.fetch(values) if self.engine.has_values else values, layouts)

    def seed(self, seed: int) -> Any:
        """Returns a random seed as an input; each replica has another one."""
        return self.engine.own([np.array((seed + ordinal * SEED_OF_REPLICA) % (1 << 64), np.uint64).view(np.int64)
                                for ordinal in range(self.engine.num_replicas)])


def read_of_plan(place: str) -> CaptureError:
    """Returns the error of a step that reads a value where no program runs."""
    return CaptureError(f"the step reads a value from the device at {place}, and a plan runs nothing that could "
                        "compute it. Choose by torch.where on the device.")


def _told(host_ops: Mapping[str, int], error: BaseException) -> CaptureError:
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if is_user_frame(frame)]
    place = f"{Path(frames[-1][0].f_code.co_filename).name}:{frames[-1][1]}" if frames else "a place in torch"
    op = new_host_op(host_ops)
    return read_of_plan(place) if op is None else CaptureError(f"{told_host_op(op, place)}.")


def _empty(tensors: Sequence[Tensor], device: str) -> None:
    """Lets tensors have no values, and nothing to compute them by."""
    for tensor, made in zip(tensors, graph.placeholders(tensors, device), strict=True):
        graph.publish(tensor, graph.inner(made))
