"""A clock that moves only when a test says so."""

from __future__ import annotations

from tpuspec.errors import ConfigError


class ManualClock:
    """Returns seconds when it is called; takes the place of time.monotonic, and its `advance` that of time.sleep.

    Args:
      start: the first reading, in seconds.
    """

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Moves the clock on.

        Raises:
          ConfigError: seconds is negative.
        """
        if seconds < 0:
            raise ConfigError(f"a clock goes forward only; got seconds={seconds}.")
        self._now += seconds
