"""The user's code beside the step: on other threads at any time, and on the loop's own thread at its boundaries."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class UserThreads:
    """Tells whether user code ran beside the loop's thread since some moment. Safe to use from every thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_begun = self._num_under_way = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Notes that the block is the user's: an input drawn ahead, a host function."""
        with self._lock:
            self._num_begun += 1
            self._num_under_way += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_under_way -= 1

    def mark(self) -> int:
        """Returns a moment for `ran_since`: the blocks that had ended by then."""
        with self._lock:
            return self._num_begun - self._num_under_way

    def ran_since(self, mark: int) -> bool:
        """Whether any block was under way at that moment, or has begun since."""
        with self._lock:
            return self._num_begun > mark


USER_THREADS = UserThreads()
"""Those of this process: there is one random state for all."""


class UserCode:
    """Counts the moments at which user code ran on the loop's thread, where it may have changed what a step reads.

    Attributes:
      num_runs: hooks, listeners, and whatever ran between two calls of a Trainer.
    """

    def __init__(self) -> None:
        self.num_runs = 0

    def ran(self) -> None:
        """Counts one."""
        self.num_runs += 1


USER_CODE = UserCode()
"""That of this process: any of it may reach any step."""


def is_users(code_owner: object) -> bool:
    """Whether the class of an object, a hook say, is the user's and not of this package."""
    module = type(code_owner).__module__
    return not module.startswith("tpuspec.") or module.startswith("tpuspec.testing")
