"""What a trace reads from the device, or computes on the host in XLA's place: neither would happen in a replay."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.overrides import TorchFunctionMode

from tpuspec.spec.functions import user_place
from tpuspec.tracer import graph

_READS = frozenset({"_local_scalar_dense"})
_SHAPED_BY_VALUES = frozenset({"nonzero", "masked_select", "unique", "_unique2", "unique_consecutive", "unique_dim"})


class HostReads:
    """Notes whether a trace reads from the device, by whatever call, and what torch_xla computes on the host.

    torch_xla counts both. Where it happened only a mode that sees every call can say: it is on in the traces after the
    first that has read, as it makes other graphs, of the same values.

    Args:
      locate: whether to say where.
    """

    def __init__(self, *, locate: bool) -> None:
        self._places = _Places() if locate else None
        self._stack = contextlib.ExitStack()
        self._ops: dict[str, int] = {}
        self._num_reads = 0
        self._new: str | None = None
        self._has_read = False

    def __enter__(self) -> HostReads:
        self._stack.enter_context(graph.nothing_fetched())
        self._ops, self._num_reads = graph.host_ops(), graph.num_reads()
        if self._places is not None:
            self._places.begin()
            self._stack.enter_context(self._places)
        return self

    def __exit__(self, *error: object) -> None:
        self._has_read = graph.num_reads() != self._num_reads
        self._new = new_host_op(self._ops)
        self._stack.close()

    @contextlib.contextmanager
    def passed_over(self) -> Iterator[None]:
        """Does not count what is read within the block."""
        before = graph.num_reads()
        try:
            yield
        finally:
            num_read = graph.num_reads() - before
            self._num_reads += num_read
            if self._places is not None:
                self._places.pass_over(num_read)

    def note(self) -> str | None:
        """Says why the trace could not be replayed; None where it stayed on the device."""
        read_at, host_op = (self._places.read_at, self._places.host_op) if self._places is not None else (None, None)
        op, place = host_op or (self._new, None)
        if op is None or (read_at is not None and op not in _SHAPED_BY_VALUES):
            if not self._has_read:
                return None
            return told_read(read_at or "some place")
        return told_host_op(op, place)


class _Places(TorchFunctionMode):
    """Finds the first place that reads from the device, and the first operation that torch_xla computes on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.read_at: str | None = None
        self.host_op: tuple[str, str | None] | None = None
        self._ops: dict[str, int] = {}
        self._num_reads = 0

    def begin(self) -> None:
        """Counts from here on."""
        self._ops, self._num_reads = graph.host_ops(), graph.num_reads()

    def pass_over(self, num_reads: int) -> None:
        """Does not count so many reads."""
        self._num_reads += num_reads

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (op := new_host_op(self._ops)) is not None:
            self.host_op = self.host_op or (op, user_place(sys._getframe(1)))
            self._ops, self._num_reads = graph.host_ops(), graph.num_reads()  # the reads are its own
        if self.read_at is None and graph.num_reads() != self._num_reads:
            self.read_at = user_place(sys._getframe(1))
        return result


def new_host_op(before: Mapping[str, int]) -> str | None:
    """Returns what torch_xla has computed on the host since `graph.host_ops` was read; None for nothing."""
    return next((op.partition(".")[0] for op, count in graph.host_ops().items()
                 if count != before.get(op, 0) and op not in _READS), None)


def told_host_op(op: str, place: str | None) -> str:
    """Says that a step has an operation that XLA has not, and what to do instead."""
    where = f" at {place}" if place else ""
    if op in _SHAPED_BY_VALUES:
        return (f"it makes a tensor whose shape depends on values{where}, by {op}, as indexing with a mask does. "
                "Keep the shape: torch.where, or a weight of 0 or 1 for each row")
    return (f"XLA has no {op}{where}, which is computed on the host, from values read from the device. Replace it, "
            "or compute it in input_fn or host_call")


def told_read(place: str) -> str:
    """Says that a step reads the device, and what to do instead."""
    return (f"it reads a value from the device at {place}: .item(), .cpu(), print and `if` on a tensor wait for the "
            "device. Return the tensor in host_call instead")
