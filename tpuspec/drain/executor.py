"""One ordered worker thread for the user's host functions, with a bounded queue."""

from __future__ import annotations

import collections
import contextlib
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NamedTuple, Self

from tpuspec.errors import HostCallError, TpuspecError
from tpuspec.spec.phase import in_phase, note_move

logger = logging.getLogger(__name__)

_SECONDS_WORTH_A_WORD = 1.0
_SHARE_WORTH_A_WORD = 0.1

_LINGER_SECONDS = 2e-3
_NEVER = sys.maxsize


class _Job(NamedTuple):
    step: int
    run: Callable[[], object]


class _Stopwatch:
    """Counts the seconds between start and stop; one thread starts and stops it, any may read it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # One tuple, so that a reader never sees half of a change.
        self._state: tuple[float, float | None] = (0.0, None)

    def start(self) -> None:
        self._state = (self._state[0], self._clock())

    def stop(self) -> None:
        self._state = (self.seconds(), None)

    def seconds(self) -> float:
        total, since = self._state
        return total if since is None else total + self._clock() - since


class HostExecutor:
    """Runs jobs on one thread, in the order of their submission.

    A full queue makes `submit` wait; where that is for the jobs' own work, it is said once, with the share of time. The
    first error of a job is raised by the next `submit`, `check` or `close`, in the caller's thread; the jobs behind it
    are dropped.

    Each time that one thread wakes the other both lose more than a small step takes. So the thread waits until enough
    jobs wait for it, somebody waits for them, or a moment has passed.

    Args:
      queue_size: jobs that may wait behind the one that runs.
      name: of the thread.
      clock: seconds.

    Attributes:
      enough: jobs that are done at once, or made room for; half of what may be under way.
    """

    def __init__(self, queue_size: int = 8, name: str = "tpuspec-host", *,
                 clock: Callable[[], float] = time.perf_counter) -> None:
        self._most = queue_size + 1
        self.enough = self._most // 2
        self._name = name
        self._clock = clock
        self._jobs: collections.deque[_Job] = collections.deque()
        # What wakes the worker. No queue.Queue: its locks cost the caller more than a small step takes.
        self._calls: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._is_asleep = self._is_closing = False
        self._num_submitted = self._num_done = 0
        self._num_wanted = _NEVER
        self._progress = threading.Event()
        self._host_work = _Stopwatch(clock)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._begun: float | None = None
        self._seconds_waited = 0.0
        self._has_told = False

    def submit(self, step: int, job: Callable[[], object]) -> None:
        """Queues a job; waits while the queue is full.

        Args:
          step: named by the error should the job raise.
          job: a function without arguments.

        Raises:
          HostCallError: an earlier job raised; its own error is the cause. An error of tpuspec's own, or one that ends
            the process (SystemExit), is raised as it is.
        """
        if self._error is not None:
            self.check()
        if self._thread is None:
            self._begun, self._is_closing = self._clock(), False
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        if self._num_submitted - self._num_done >= self._most:
            self._wait_for_room()
        self._num_submitted += 1
        self._jobs.append(_Job(step, job))
        # In this order: the worker first says that it sleeps, then looks for jobs.
        if self._is_asleep or len(self._jobs) == self.enough:
            self._calls.put(None)

    @contextlib.contextmanager
    def waiting_for_device(self) -> Iterator[None]:
        """Within a job: what the block takes is no host work."""
        self._host_work.stop()
        try:
            yield
        finally:
            self._host_work.start()

    @property
    def num_under_way(self) -> int:
        """Jobs that were submitted and have not ended."""
        return self._num_submitted - self._num_done

    def wait(self, *, left: int = 0, seconds: float | None = None) -> bool:
        """Waits until at most `left` jobs are under way, or so many seconds, and returns whether so few are."""
        return self._wait_until(self._num_submitted - left, seconds)

    def check(self) -> None:
        """Raises the error of a job, if there is one.

        Raises:
          HostCallError: as `submit`.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Waits for the queued jobs, and ends the thread.

        Raises:
          HostCallError: as `submit`.
        """
        if self._thread is not None:
            self._is_closing = True
            self._calls.put(None)
            self._thread.join()
            self._thread = None
        self.check()

    def _wait_for_room(self) -> None:
        worked_before = self._host_work.seconds()
        # For more room than one job's: the device has enough to go on with, and both threads wake up more seldom.
        self._wait_until(self._num_submitted - self._most + self.enough)
        # A worker that waits for the device, as the loop does through it, is not slower than the device.
        self._seconds_waited += self._host_work.seconds() - worked_before
        if self._has_told or self._seconds_waited < _SECONDS_WORTH_A_WORD:
            return
        assert self._begun is not None, "set by the first submit"
        share = self._seconds_waited / (self._clock() - self._begun)
        if share >= _SHARE_WORTH_A_WORD:
            self._has_told = True
            logger.warning(
                "host work is slower than the device: the loop waited for it %.0f %% of the time so far, its queue of "
                "%d steps being full. Make host_call or metric_fn cheaper, or call host_call less often "
                "(TPUConfig.host_call_every_n_steps).", 100 * share, self._most - 1)

    def _wait_until(self, num_done: int, seconds: float | None = None) -> bool:
        if self._num_done >= num_done:
            return True
        end = None if seconds is None else time.monotonic() + seconds
        # In this order: the worker first counts, then looks what is wanted, so a job that ends meanwhile is not missed.
        self._num_wanted = num_done
        self._calls.put(None)
        try:
            with in_phase("host work"):
                while self._num_done < num_done and (end is None or time.monotonic() < end):
                    self._progress.clear()
                    if self._num_done < num_done:
                        self._progress.wait(None if end is None else max(0.0, end - time.monotonic()))
        finally:
            self._num_wanted = _NEVER
        return self._num_done >= num_done

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        if error is None or isinstance(error, GeneratorExit):  # a predict() that its user closes
            self.close()
            return
        try:
            self.close()
        except BaseException as second:
            if second is not error:  # the first error wins; the second is told of
                logger.warning("while %s was on its way, host work failed too: %s", type(error).__name__, second)

    def _work(self) -> None:
        failed = False
        while num_jobs := self._wait_for_jobs():
            for _ in range(num_jobs):
                job = self._jobs.popleft()
                if not failed:
                    self._host_work.start()
                    try:
                        job.run()
                    except BaseException as error:
                        self._error, failed = _as_host_error(error, job.step), True
                    self._host_work.stop()
                self._num_done += 1
                note_move()
                if self._num_done >= self._num_wanted:
                    self._progress.set()

    def _wait_for_jobs(self) -> int:
        """Waits until jobs are to be run, and returns how many; 0 at the end."""
        end = time.monotonic() + _LINGER_SECONDS
        while len(self._jobs) < self.enough and not self._is_closing and self._num_wanted == _NEVER:
            left = end - time.monotonic()
            if left > 0:
                with contextlib.suppress(queue.Empty):
                    self._calls.get(timeout=left)
            elif self._jobs:
                break
            else:
                self._sleep()
                end = time.monotonic() + _LINGER_SECONDS
        while not self._jobs and not self._is_closing:  # somebody waits for jobs that are under way, or has waited
            self._sleep()
        return len(self._jobs)

    def _sleep(self) -> None:
        self._is_asleep = True
        if not self._jobs and not self._is_closing:
            self._calls.get()
        self._is_asleep = False


def _as_host_error(error: BaseException, step: int) -> BaseException:
    if isinstance(error, TpuspecError) or not isinstance(error, Exception):
        return error
    wrapped = HostCallError(f"host work of step {step} raised {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


def host_call_error(name: str, step: int, error: Exception, *, global_step: int | None = None) -> HostCallError:
    """Returns the error that says which of the user's host functions raised, and at which step.

    Args:
      name: 'host_call' or 'metric_fn'.
      step: the step, counted from 1.
      error: what the function raised.
      global_step: in train, the value that model_fn saw, before the step's update.
    """
    before = "" if global_step is None else f" (global_step {global_step} before its update)"
    return HostCallError(f"{name} raised {type(error).__name__} at step {step}{before}: {error}")
