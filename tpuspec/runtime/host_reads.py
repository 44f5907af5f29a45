"""What a trace reads from the device, or computes on the host in XLA's place: neither would happen in a replay."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from tpuspec.runtime import graph

_READERS = frozenset({"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__format__",
                      "__repr__", "__array__", "is_nonzero", "equal", "allclose"})
_SHAPED_BY_VALUES = frozenset({"nonzero", "masked_select", "unique", "_unique2", "unique_consecutive", "unique_dim"})


class HostReads(TorchFunctionMode):
    """Notes what this thread reads from the device, and what torch_xla computes on the host, with the first place.

    The worker reads other tensors at the same time, which is no concern of the trace.
    """

    def __init__(self) -> None:
        super().__init__()
        self._read_at: str | None = None
        self._host_op: tuple[str, str | None] | None = None
        self._ops = graph.host_ops()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if self._read_at is None and (name in _READERS or name == "to") and _reads_device(name, args):
            self._read_at = _user_place(sys._getframe(1))
        result = func(*args, **(kwargs or {}))
        if self._host_op is None and (op := self._new_op()) is not None:
            self._host_op = (op, _user_place(sys._getframe(1)))
        return result

    def note(self) -> str | None:
        """Says why the trace could not be replayed; None where it stayed on the device."""
        if self._read_at is not None:
            return (f"it reads a value from the device at {self._read_at}: .item(), .cpu(), print and `if` on a tensor "
                    "wait for the device. Return the tensor in host_call instead")
        op, place = self._host_op or (self._new_op(), None)
        if op is None:
            return None
        where = f" at {place}" if place else ""
        if op in _SHAPED_BY_VALUES:
            return (f"it makes a tensor whose shape depends on values{where}, by {op}, as indexing with a mask does. "
                    "Keep the shape: torch.where, or a weight of 0 or 1 for each row")
        return (f"XLA has no {op}{where}, which is computed on the host, from values read from the device. Replace it, "
                "or compute it in input_fn or host_call")

    def _new_op(self) -> str | None:
        return next((op.partition(".")[0] for op, count in graph.host_ops().items()
                     if count != self._ops.get(op, 0)), None)


def _reads_device(name: str, args: Any) -> bool:
    if not args or not isinstance(args[0], Tensor) or args[0].device.type != "xla":
        return False
    return name != "to" or any(str(arg).startswith("cpu") for arg in args[1:])


def _user_place(frame: FrameType | None) -> str:
    """Returns FILE:LINE of the innermost caller that is neither torch's nor tpuspec's."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if not module.startswith(("torch.", "tpuspec.", "torch_xla.")):
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "a place in torch"
