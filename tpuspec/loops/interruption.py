"""SIGINT and SIGTERM during training: the step under way is finished and saved, then the process ends."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Which signal came, if any.

    Attributes:
      signal: its number; None while none came.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def end(self) -> None:
        """Raises what the signal asks for.

        Raises:
          KeyboardInterrupt: SIGINT came.
          SystemExit: SIGTERM came; with code 143.
        """
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is not None:
            raise SystemExit(128 + self.signal)


@contextlib.contextmanager
def stop_on_signals(request_stop: Callable[[], None]) -> Iterator[Interruption]:
    """Turns the first SIGINT or SIGTERM within the block into a stop request; the second one ends the block at once.

    Only the main thread can take signals; in another one nothing changes.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if interruption.signal is not None:
            interruption.signal = number
            interruption.end()
        interruption.signal = number
        request_stop()

    previous = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
