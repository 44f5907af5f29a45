"""The user's code on other threads than the loop's: it may draw from the process's random state at any time."""

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
