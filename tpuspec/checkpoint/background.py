"""One save at a time on a thread of its own; what goes wrong there is raised where training goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from tpuspec.errors import HangError


class BackgroundSave:
    """Runs saves one after the other, each on a thread.

    Args:
      timeout_seconds: of one save; None for none.
      clock: monotonic seconds.
    """

    def __init__(self, timeout_seconds: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout_seconds = timeout_seconds
        self._clock = clock
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._step, self._begun = 0, 0.0

    def start(self, step: int, save: Callable[[], object]) -> None:
        """Waits for the save under way, then starts the next one.

        Raises:
          BaseException: what the save before raised.
          HangError: the save before does not end.
        """
        self.wait()
        self._step, self._begun = step, self._clock()
        # A daemon: a disk that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, args=(save,), name="tpuspec-save", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Looks, without waiting, how the save under way fares.

        Raises:
          BaseException: what a save raised, once.
          HangError: it does not end.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self._thread is not None and not self._thread.is_alive():
            self._thread = None
        if self._thread is not None and self._remaining() <= 0:
            raise HangError(f"The checkpoint of step {self._step} is being written for more than "
                            f"{self._timeout_seconds} s: the disk of model_dir does not answer. Earlier checkpoints "
                            "are untouched. Mend the disk, or raise RunConfig.checkpoint_timeout_secs.")

    def wait(self) -> None:
        """Returns when no save is under way.

        Raises:
          BaseException, HangError: as `check`.
        """
        if self._thread is not None:
            self._thread.join(None if self._timeout_seconds is None else max(0.0, self._remaining()))
        self.check()

    def _remaining(self) -> float:
        if self._timeout_seconds is None:
            return float("inf")
        return self._timeout_seconds - (self._clock() - self._begun)

    def _run(self, save: Callable[[], object]) -> None:
        try:
            save()
        except BaseException as error:
            self._error = error
