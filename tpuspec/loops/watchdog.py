"""Ends a run that does not move any more: stacks of all threads to standard error, exit code 4."""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Callable, Mapping
from typing import Self

from tpuspec.config import RunConfig
from tpuspec.errors import HangError
from tpuspec.loops.ending import end_process, last_words
from tpuspec.spec.phase import current_phase, num_moves

_SETTINGS = {"compile": "compile_hang_seconds", "save": "checkpoint_timeout_secs"}
_LONGEST_TICK_SECONDS, _TICKS = 1.0, 10
_TELL_SECONDS = 2.0
_SECONDS_BEHIND_SAVE = 10.0
_STDERR = 2
_one_ends = threading.Lock()


class Watchdog:
    """Watches, on a thread, whether anything moves: a step, a batch, host work, or one phase to the next.

    Time in which the whole process stood still (SIGSTOP, a debugger) does not count.

    Args:
      limits: the longest time without a move by the name of its setting: 'hang_seconds', 'compile_hang_seconds' while
        XLA compiles, 'checkpoint_timeout_secs' while the loop waits for a save. None or no entry does not watch.
      tell: told of the hang, and of the phase, before the process ends; may fail, or hang.
      end: ends the process with an exit code.
      clock: monotonic seconds.
    """

    def __init__(self, limits: Mapping[str, float | None], *,
                 tell: Callable[[HangError, str], object] = lambda error, phase: None,
                 end: Callable[[int], object] = end_process, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = {name: limit for name, limit in limits.items() if limit is not None}
        self._tell, self._end, self._clock = tell, end, clock
        self._tick_seconds = min([_LONGEST_TICK_SECONDS, *(limit / _TICKS for limit in self._limits.values())])
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tpuspec-watchdog", daemon=True)
        self._num_pauses = 0

    def __enter__(self) -> Self:
        if self._limits:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        if self._limits:
            self._thread.join()

    def pause(self) -> None:
        """Does not watch until `resume`: somebody else's code runs, which may take its time."""
        self._num_pauses += 1

    def resume(self) -> None:
        """Watches again."""
        self._num_pauses -= 1

    def _run(self) -> None:
        idle, seen, last = 0.0, num_moves(), self._clock()
        while not self._closed.wait(self._tick_seconds):
            now = self._clock()
            # Not longer than a tick takes: the process may have been stopped.
            idle += min(now - last, 2 * self._tick_seconds)
            last = now
            if self._num_pauses or seen != (seen := num_moves()):
                idle = 0.0
                continue
            phase = current_phase()
            setting = _SETTINGS.get(phase, "hang_seconds")
            limit = self._limits.get(setting)
            if limit is not None and idle >= limit and _one_ends.acquire(blocking=False):
                self._end_hung(phase, setting, idle)
                _one_ends.release()
                return

    def _end_hung(self, phase: str, setting: str, seconds: float) -> None:
        text = (f"no step, batch or host work has moved for {seconds:.0f} s, in {phase}. The stacks of all threads are "
                f"on standard error. If that may take so long, raise RunConfig.{setting}; None does not watch.")
        last_words(f"error: {text}")
        faulthandler.dump_traceback(_STDERR, all_threads=True)
        # On a thread of its own, for it may hang as well.
        told = threading.Thread(target=self._tell, args=(HangError(text), phase), daemon=True)
        told.start()
        told.join(_TELL_SECONDS)
        self._end(HangError.exit_code)


def make_watchdog(config: RunConfig, tell: Callable[[HangError, str], object]) -> Watchdog:
    """Returns the watchdog of one call of the Trainer; see `Watchdog`."""
    save = config.checkpoint_timeout_secs
    return Watchdog({
        "hang_seconds": config.hang_seconds, "compile_hang_seconds": config.compile_hang_seconds,
        # An asynchronous save has its own deadline, which says more.
        "checkpoint_timeout_secs": None if save is None else save + _SECONDS_BEHIND_SAVE}, tell=tell)
