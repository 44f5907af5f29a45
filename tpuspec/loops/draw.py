"""The drawing of the next batch, from which a signal, or an error of the input, leaves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TypeVar

from tpuspec.loops.agreement import InputEnd
from tpuspec.loops.interruption import Interruption
from tpuspec.spec.phase import in_phase

T = TypeVar("T")


def drawing(input_end: InputEnd) -> AbstractContextManager[None]:
    """Says that the block draws a batch: of this host's input, or, where it is shared, agreed on with the others."""
    return in_phase("the next batch" if input_end.is_shared else "input_fn")


def draw(batches: Iterator[T], interruption: Interruption, input_end: InputEnd) -> T | None:
    """Returns the next batch; None at the end of the input, and where a signal breaks the wait for it off.

    Args:
      batches: the input.
      interruption: of this call.
      input_end: of this input; where it is shared, what is waited for may be another host.

    Raises:
      Exception: of the input, as it is; not behind a signal, which may have ended its workers as well.
    """
    try:
        with drawing(input_end):
            return next(batches, None)
    except BaseException:
        if interruption.is_first:
            return None
        raise
