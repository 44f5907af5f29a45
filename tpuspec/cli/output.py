"""Standard output and error whose reader may go away, as in `| head`: the run goes on, and says nothing more there."""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO


class _QuietWhenClosed(io.TextIOWrapper):
    """Text output that goes nowhere once its reader has gone."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            self._go_nowhere()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._go_nowhere()

    def _go_nowhere(self) -> None:
        # The descriptor itself: what is buffered, and what C++ writes, goes there too.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def survive_closed_output() -> None:
    """Lets this process live on when standard output or error is closed, now or later."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # the next file that is opened, a checkpoint's perhaps, would be taken for it
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = _quiet(sys.stdout), _quiet(sys.stderr)


def _quiet(stream: TextIO | None) -> TextIO:
    if not isinstance(stream, io.TextIOWrapper):
        return open(os.devnull, "w") if stream is None else stream
    return _QuietWhenClosed(stream.buffer, encoding=stream.encoding, errors=stream.errors,
                            line_buffering=stream.line_buffering, write_through=stream.write_through)
