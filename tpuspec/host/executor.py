"""One ordered worker thread for the user's host functions, with a bounded queue."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple, Self

from tpuspec.errors import HostCallError, TpuspecError

logger = logging.getLogger(__name__)

_STOP = object()


class _Job(NamedTuple):
    step: int
    run: Callable[[], object]


class HostExecutor:
    """Runs jobs on one thread, in the order of their submission.

    A full queue makes `submit` wait. The first error of a job is raised by the next `submit`, or by `close`, in the
    caller's thread; the jobs behind it are dropped.

    Args:
      queue_size: jobs that may wait.
      name: of the thread.
    """

    def __init__(self, queue_size: int = 8, name: str = "tpuspec-host") -> None:
        self._queue: queue.Queue[object] = queue.Queue(maxsize=queue_size)
        self._name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, step: int, job: Callable[[], object]) -> None:
        """Queues a job; waits while the queue is full.

        Args:
          step: named by the error should the job raise.
          job: a function without arguments.

        Raises:
          HostCallError: an earlier job raised; its own error is the cause. An error of tpuspec's own, or one that ends
            the process (SystemExit), is raised as it is.
        """
        self._raise_error()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            self._thread.start()
        self._queue.put(_Job(step, job))

    def close(self) -> None:
        """Waits for the queued jobs, and ends the thread.

        Raises:
          HostCallError: as `submit`.
        """
        if self._thread is not None:
            self._queue.put(_STOP)
            self._thread.join()
            self._thread = None
        self._raise_error()

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

    def _raise_error(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _work(self) -> None:
        failed = False
        while isinstance(job := self._queue.get(), _Job):
            if failed:
                continue
            try:
                job.run()
            except BaseException as error:
                self._error, failed = _as_host_error(error, job.step), True


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
