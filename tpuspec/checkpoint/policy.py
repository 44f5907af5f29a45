"""When to save and which checkpoints to delete: decisions only, nothing here touches a file."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tpuspec.errors import ConfigError

_SECONDS_PER_HOUR = 3600.0


class SavePolicy:
    """Saves at the first chance, then every n steps or seconds; never twice for one step.

    Args:
      every_steps: steps since the last save, None or 0 for no such rule.
      every_seconds: seconds since the last save, likewise; with both, whichever comes first.
      clock: monotonic seconds.

    Raises:
      ConfigError: a distance is negative.

    Source: tf.estimator.SecondOrStepTimer.
    """

    def __init__(self, every_steps: int | None, every_seconds: float | None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        for name, value in (("every_steps", every_steps), ("every_seconds", every_seconds)):
            if value is not None and not value >= 0:
                raise ConfigError(f"SavePolicy.{name} must be >= 0, or None; got {value!r}.")
        self._every_steps = every_steps or None
        self._every_seconds = every_seconds or None
        self._clock = clock
        self._last_step: int | None = None
        self._last_seconds = 0.0

    @property
    def enabled(self) -> bool:
        """Whether it ever saves."""
        return self._every_steps is not None or self._every_seconds is not None

    @property
    def last_saved_step(self) -> int | None:
        """The step that was marked last."""
        return self._last_step

    def should_save(self, step: int) -> bool:
        """Whether to save now, after `step` completed updates."""
        if not self.enabled or step == self._last_step:
            return False
        if self._last_step is None:
            return True
        if self._every_steps is not None and step - self._last_step >= self._every_steps:
            return True
        return self._every_seconds is not None and self._clock() - self._last_seconds >= self._every_seconds

    def should_save_last(self, step: int) -> bool:
        """Whether to save at the end of training: any step that is not saved."""
        return self.enabled and step != self._last_step

    def saved(self, step: int) -> None:
        """Marks `step` as saved, or as restored from its checkpoint; both distances count from here."""
        self._last_step = step
        self._last_seconds = self._clock()


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionPolicy:
    """Which checkpoints stay: the newest, and besides one for every n hours of training.

    Attributes:
      max_to_keep: newest checkpoints to keep; None or 0 keeps all.
      keep_every_n_hours: of the older ones, the first after each n hours stays too; None keeps none of them.

    Raises:
      ConfigError: a number is negative, or the hours are zero.

    Source: tf.train.Saver.
    """

    max_to_keep: int | None = 5
    keep_every_n_hours: float | None = 10000

    def __post_init__(self) -> None:
        if self.max_to_keep is not None and self.max_to_keep < 0:
            raise ConfigError(f"RetentionPolicy.max_to_keep must be >= 0, or None; got {self.max_to_keep!r}.")
        if self.keep_every_n_hours is not None and not self.keep_every_n_hours > 0:
            raise ConfigError(f"RetentionPolicy.keep_every_n_hours must be > 0, or None; got "
                              f"{self.keep_every_n_hours!r}.")

    def steps_to_delete(self, checkpoints: Sequence[tuple[int, float]], started_at_seconds: float) -> list[int]:
        """Returns the steps to delete, in ascending order.

        What one call keeps for its hours, later calls keep as well, over restarts too.

        Args:
          checkpoints: (step, seconds at its commit) of every committed checkpoint.
          started_at_seconds: when training began, by the same clock; the hours count from here.
        """
        if not self.max_to_keep:
            return []
        older = sorted(checkpoints)[:-self.max_to_keep]
        if self.keep_every_n_hours is None:
            return [step for step, _ in older]
        period = self.keep_every_n_hours * _SECONDS_PER_HOUR
        keep_after = started_at_seconds + period
        delete = []
        for step, seconds in older:
            if seconds <= keep_after:
                delete.append(step)
            else:
                # To the period's end, and not one period on as in tf.train.Saver: after a pause of a week that would
                # keep everything for as long as it takes to catch up.
                keep_after += period * math.ceil((seconds - keep_after) / period)
        return delete
