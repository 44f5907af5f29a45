"""SIGINT and SIGTERM: the step under way is finished and saved, then the process ends; by force where it cannot.

Python calls handlers in the main thread, and only between two instructions of Python. A compiler, or a collective that
waits for a lost peer, can keep it from there for ever; a thread that the kernel's handler writes to (`set_wakeup_fd`)
sees the signal nevertheless, and ends the process when the grace time is over.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from tpuspec.loops.ending import end_process, last_words
from tpuspec.spec.coordinator import Coordinator
from tpuspec.spec.phase import current_phase

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SECONDS_AFTER_SECOND = 2.0
_HOST_WORK_SHARE, _NUDGE_SHARE = 0.25, 0.5
_LOOK_AGAIN_SECONDS = 0.1
_END = b"\0"  # no signal has this number

_active: Interruption | None = None


class Interruption:
    """Which signal came, if any, and what is to be done about it.

    Attributes:
      signal: its number; None while none came.
      grace_seconds: time from the first signal to the end of the process.
      is_agreed: whether every host knows of it, and ends as this one does.
      may_break_off: whether a loop that has not come to a boundary halfway through the grace time is broken off
        wherever it is, if Python is running there.
    """

    def __init__(self, grace_seconds: float) -> None:
        self.signal: int | None = None
        self.grace_seconds = grace_seconds
        self.is_agreed = False
        self.may_break_off = False
        self._breaks_input = False
        self._num_signals = 0
        self._is_nudged = False
        self._requests: list[Callable[[], None]] = []
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Takes the signals that are not ignored."""
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)

    def uninstall(self) -> None:
        """Gives the handlers that were there before back."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    @contextlib.contextmanager
    def stops(self, request_stop: Callable[[], None]) -> Iterator[None]:
        """Within the block a signal does not raise, but calls `request_stop`; so does one that came before."""
        self._requests.append(request_stop)
        try:
            if self.signal is not None:
                request_stop()
            yield
        finally:
            self._requests.remove(request_stop)

    @contextlib.contextmanager
    def breaks_off(self, *, is_alone: bool) -> Iterator[None]:
        """Within the block a loop runs, which a signal breaks off where it waits for its input.

        Args:
          is_alone: whether it can be broken off elsewhere too: no other host waits for what this one does next.
        """
        before = self._breaks_input, self.may_break_off
        self._breaks_input, self.may_break_off = True, is_alone
        try:
            yield
        finally:
            self._breaks_input, self.may_break_off = before

    @property
    def is_first(self) -> bool:
        """Whether one signal has come, and no second one, behind which nothing is waited for."""
        return self.signal is not None and self._num_signals <= 1

    @property
    def host_work_seconds(self) -> float | None:
        """How long the last save may wait for host work: None, for ever, unless a signal came."""
        return None if self.signal is None else self.grace_seconds * _HOST_WORK_SHARE

    def agree(self, coordinator: Coordinator) -> None:
        """Makes a signal of one host that of all; they ask at the same point."""
        if coordinator.num_hosts > 1:
            self.signal = max(coordinator.exchange(self.signal or 0, name="a signal")) or None
        self.is_agreed = self.signal is not None

    def end(self, *notes: str) -> None:
        """Raises what the signal asks for; does nothing where none came.

        Args:
          notes: for people, added to the exception.

        Raises:
          KeyboardInterrupt: SIGINT came.
          SystemExit: SIGTERM came; with code 143.
        """
        if self.signal is None:
            return
        error = KeyboardInterrupt() if self.signal == signal.SIGINT else SystemExit(128 + self.signal)
        for note in notes:
            error.add_note(note)
        raise error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_nudged:
            self._is_nudged = False
            self.end(f"broken off (in {current_phase()}), as half of RunConfig.grace_seconds is over. The newest "
                     "committed checkpoint stays.")
        self._num_signals += 1
        self.signal = number
        if self._num_signals > 1:
            self.end()
        self._ignore_children()
        for request in self._requests:
            request()
        if not self._requests or (self._breaks_input and current_phase() == "input_fn"):
            self.end()

    def _ignore_children(self) -> None:
        # torch raises where a loader's worker died, wherever the main thread is. The same signal may have ended it.
        if callable(handler := signal.getsignal(signal.SIGCHLD)):
            self._previous[signal.SIGCHLD] = handler
            signal.signal(signal.SIGCHLD, lambda number, frame: None)

    def nudge(self) -> None:
        """Breaks the main thread off where it is, once it runs Python again."""
        self._is_nudged, self.may_break_off = True, False
        assert self.signal is not None, "only a signal that is not heeded is nudged"
        signal.pthread_kill(threading.main_thread().ident or 0, self.signal)


class _Enforcer:
    """A thread that learns of signals from the kernel's handler, and ends a process that does not end in time.

    Args:
      interruption: what the main thread knows of them.
      owns_process: whether SIGINT ends the process too, and not only SIGTERM.
    """

    def __init__(self, interruption: Interruption, *, owns_process: bool) -> None:
        self._interruption = interruption
        self._owns_process = owns_process
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._previous = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._number = self._num_own = 0
        self._nudge_at = self._end_at = float("inf")
        self._thread = threading.Thread(target=self._run, name="tpuspec-signals", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, and gives the descriptor of signals back."""
        signal.set_wakeup_fd(self._previous)
        os.write(self._write_end, _END)
        self._thread.join()
        os.close(self._read_end)
        os.close(self._write_end)

    def _run(self) -> None:
        while True:
            due = min(self._nudge_at, self._end_at) - time.monotonic()
            ready, _, _ = select.select([self._read_end], [], [], None if due == float("inf") else max(0.0, due))
            data = os.read(self._read_end, 64) if ready else b""
            if self._previous != -1 and (others := data.replace(_END, b"")):
                with contextlib.suppress(OSError):
                    os.write(self._previous, others)
            if _END in data:
                return
            for number in data:
                if number in _SIGNALS:
                    self._take(number)
            self._act(time.monotonic())

    def _take(self, number: int) -> None:
        if self._num_own:
            self._num_own -= 1
            return
        now, grace = time.monotonic(), self._interruption.grace_seconds
        if self._number:
            self._end_at = min(self._end_at, now + _SECONDS_AFTER_SECOND)
        else:
            self._nudge_at, self._end_at = now + grace * _NUDGE_SHARE, now + grace
        self._number = number

    def _act(self, now: float) -> None:
        if now >= self._nudge_at and self._interruption.signal is None:
            self._nudge_at = now + _LOOK_AGAIN_SECONDS  # the main thread is not in Python, and saw no signal yet
        if now >= self._nudge_at:
            self._nudge_at = float("inf")
            if self._interruption.may_break_off:
                self._num_own += 1
                self._interruption.nudge()
        if now >= self._end_at:
            self._end_at = float("inf")
            # A notebook's Ctrl-C must not end it, however long a compiler takes.
            if self._owns_process or self._number != signal.SIGINT:
                name = signal.Signals(self._number).name
                last_words(f"interrupted by {name}: the process has not come to its end in time (in "
                           f"{current_phase()}), and is ended. The newest committed checkpoint stays. "
                           "RunConfig.grace_seconds, or a second signal, sets the time.")
                end_process(128 + self._number)


@contextlib.contextmanager
def interruptible(grace_seconds: float, *, owns_process: bool = False) -> Iterator[Interruption]:
    """Takes SIGINT and SIGTERM within the block, and gives the handlers that were there before back.

    Outside of every `Interruption.stops` a signal raises at once; within, it is a stop request. The second one raises
    at once everywhere. When the grace time is over, SIGTERM ends the process by force. Blocks within one another share
    one Interruption. In a thread that is not the main one nothing changes, nor for a signal that is ignored.

    Args:
      grace_seconds: see `Interruption`.
      owns_process: whether SIGINT, too, ends the process by force.
    """
    global _active
    if threading.current_thread() is not threading.main_thread():
        yield Interruption(grace_seconds)
        return
    if _active is not None:
        _active.grace_seconds = grace_seconds
        yield _active
        return
    interruption = _active = Interruption(grace_seconds)
    interruption.install()
    enforcer = _Enforcer(interruption, owns_process=owns_process)
    try:
        yield interruption
    finally:
        enforcer.close()
        interruption.uninstall()
        _active = None


def _in_forked_child() -> None:
    """Leaves a forked child (a DataLoader's worker) out of it: it would write its signals to its parent's thread."""
    global _active
    if _active is not None:
        signal.set_wakeup_fd(-1)
        _active.uninstall()
        # Ctrl-C goes to the whole group; the parent, which finishes its step, ends its children.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _active = None


os.register_at_fork(after_in_child=_in_forked_child)
