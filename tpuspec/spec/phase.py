"""Which part of a run this process is in, and which an error came from: for hosts that learn of it from afar."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tpuspec.errors import HostCallError

_ATTRIBUTE = "_tpuspec_phase"
_HOST_FUNCTIONS = ("metric_fn", "host_call")

_current = ["start"]
"""Phases that are entered, innermost last; read by the thread that tells the other hosts."""


def current_phase() -> str:
    """Returns the innermost part of the run that the loop's thread is in."""
    return _current[-1]


@contextlib.contextmanager
def in_phase(name: str) -> Iterator[None]:
    """Says that the block belongs to a part of the run; marks an error that leaves it, unless an inner block has."""
    _current.append(name)
    try:
        yield
    except Exception as error:
        if not hasattr(error, _ATTRIBUTE):
            with contextlib.suppress(AttributeError):  # an error with slots stays unmarked
                setattr(error, _ATTRIBUTE, name)
        raise
    finally:
        _current.pop()


def phase_of(error: BaseException, default: str) -> str:
    """Returns the part of the run that an error came from: 'input_fn', 'model_fn', 'metric_fn', 'host_call'."""
    if isinstance(error, HostCallError):
        first = str(error).split(" ", 1)[0]
        return first if first in _HOST_FUNCTIONS else "host work"
    return getattr(error, _ATTRIBUTE, default)
