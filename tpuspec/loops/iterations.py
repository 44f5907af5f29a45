"""How many steps the next loop has: a count, or what is estimated to fill a time."""

from __future__ import annotations

import collections
import math

from tpuspec.config import LoopLength
from tpuspec.errors import ConfigError


class IterationCountEstimator:
    """Estimates how many steps fill a time, from the newest loops.

    Args:
      capacity: loops that are remembered.

    Source: tpu/iteration_count_estimator.py of TPUEstimator.
    """

    def __init__(self, capacity: int = 20) -> None:
        self._seconds_per_step: collections.deque[float] = collections.deque(maxlen=capacity)

    def update(self, runtime_seconds: float, num_steps: int) -> None:
        """Adds a loop; one without time or steps says nothing and is ignored."""
        if runtime_seconds > 0 and num_steps > 0:
            self._seconds_per_step.append(runtime_seconds / num_steps)

    def get(self, target_seconds: float) -> int:
        """Returns the steps that fill `target_seconds`, at least 1; 1 before any loop is known.

        Raises:
          ConfigError: target_seconds is not positive.
        """
        if target_seconds <= 0:
            raise ConfigError(f"target_seconds must be positive; got {target_seconds}.")
        if not self._seconds_per_step:
            return 1
        mean = sum(self._seconds_per_step) / len(self._seconds_per_step)
        return max(1, math.floor(target_seconds / mean + 0.5))


class LoopSizer:
    """Sizes of loops that end exactly at the last step.

    Args:
      length: iterations_per_loop, parsed.
      last_step: global step to end at; None for no end.
    """

    def __init__(self, length: LoopLength, last_step: int | None) -> None:
        self._length = length
        self._last_step = last_step
        self._estimator = IterationCountEstimator()

    def next_size(self, step: int, *, stops: bool = False) -> int:
        """Returns the steps of the loop that starts after `step`; 0 at the end, or where this host stops."""
        if stops:
            return 0
        size = self._length.value if self._length.unit == "count" else self._estimator.get(self._length.value)
        return size if self._last_step is None else min(size, max(0, self._last_step - step))

    def finished(self, runtime_seconds: float, num_steps: int) -> None:
        """Takes the time of a loop that was run."""
        self._estimator.update(runtime_seconds, num_steps)
