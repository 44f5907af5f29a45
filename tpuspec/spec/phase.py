"""Which part of a run this process is in, whether it moves, and which part an error came from."""

from __future__ import annotations

import contextlib
from types import TracebackType

from tpuspec.errors import HostCallError

_PHASE, _STEP = "_tpuspec_phase", "_tpuspec_step"
_HOST_FUNCTIONS = ("metric_fn", "host_call")

_current = ["start"]
"""Phases that are entered, innermost last; written by the loop's thread, read by others."""
_num_moves = 0


def current_phase() -> str:
    """Returns the innermost part of the run that the loop's thread is in."""
    return _current[-1]


def note_move() -> None:
    """Says that something was done: a step, a batch, host work; may be called from any thread."""
    global _num_moves
    _num_moves += 1


def num_moves() -> int:
    """Returns a number that changes as long as the run moves."""
    return _num_moves


class _Phase:
    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        _current.append(self._name)
        note_move()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        _current.pop()
        note_move()
        if isinstance(error, Exception) and not hasattr(error, _PHASE):
            _mark(error, _PHASE, self._name)


def in_phase(name: str) -> contextlib.AbstractContextManager[None]:
    """Says that the block belongs to a part of the run; marks an error that leaves it, unless an inner block has."""
    return _Phase(name)  # no generator: it is entered for each batch


def phase_of(error: BaseException, default: str) -> str:
    """Returns the part of the run that an error came from, such as 'input_fn', 'model_fn', 'host_call' or 'save'."""
    if isinstance(error, HostCallError):
        first = str(error).split(" ", 1)[0]
        return first if first in _HOST_FUNCTIONS else "host work"
    return getattr(error, _PHASE, default)


def mark_step(error: BaseException, step: int) -> None:
    """Notes at which step, counted from 1, an error came, unless that is known."""
    if not hasattr(error, _STEP):
        _mark(error, _STEP, step)


def step_of(error: BaseException) -> int | None:
    """Returns the step, counted from 1, that an error came at; None where it came at none."""
    return getattr(error, _STEP, None)


def _mark(error: BaseException, name: str, value: object) -> None:
    with contextlib.suppress(AttributeError):  # an error with slots stays unmarked
        setattr(error, name, value)
