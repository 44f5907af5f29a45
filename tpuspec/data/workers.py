"""A DataLoader's worker processes: kept apart from the run's signals and tensors, named when they die, and ended."""

from __future__ import annotations

import functools
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from types import TracebackType
from typing import Any

from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data._utils import signal_handling
from torch.utils.data._utils import worker as torch_worker

from tpuspec.data.random_state import ProcessRandomState
from tpuspec.errors import InputError

_END_SECONDS = 5.0
_HINTS = {"SIGKILL": " The machine may have run out of memory.", "SIGBUS": " /dev/shm may be full."}


def start_iterator(source: Iterable[Any]) -> Iterator[Any]:
    """Returns an iterator over a source; that of a DataLoader with workers is a `WorkerBatches`."""
    if isinstance(source, DataLoader) and source.num_workers > 0:
        return WorkerBatches(source)
    return iter(source)


class WorkerBatches:
    """The batches of a DataLoader with workers.

    torch raises the death of a worker in whatever the main thread is doing. Here it is raised where the next batch is
    asked for, behind the batches before it, at most five seconds later.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        own_init, self._is_persistent = loader.worker_init_fn, loader.persistent_workers
        loader.worker_init_fn = functools.partial(_start_worker, own_init)
        try:
            # Of torch 2.9; its processes have no public name.
            self._iterator: Any = iter(loader)
        finally:
            loader.worker_init_fn = own_init
        if getattr(self._iterator, "_worker_pids_set", False):
            signal_handling._remove_worker_pids(id(self._iterator))
            self._iterator._worker_pids_set = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            return next(self._iterator)
        except (RuntimeError, OSError, EOFError) as error:
            dead = self._dead_workers(error)
            if not dead:
                raise
            raise InputError(
                f"a worker process of the DataLoader died: {', '.join(map(_describe, dead))}.{_hint(dead)} With "
                "num_workers=0 its error shows here.") from error

    def close(self) -> None:
        """Ends the workers, though an error's traceback may still hold the iterator.

        Persistent ones stay for the next iteration of their DataLoader, which ends them.
        """
        if not self._is_persistent:
            self._iterator._shutdown_workers()

    def _dead_workers(self, error: Exception) -> list[BaseProcess]:
        if str(error).startswith("Caught "):  # in a worker, which told it
            return []
        workers: list[BaseProcess] = getattr(self._iterator, "_workers", [])
        if not isinstance(error, RuntimeError):
            # A batch's memory is fetched from the worker that made it, which may be ending just now.
            ending = wait([worker.sentinel for worker in workers if worker.exitcode is None], _END_SECONDS)
            for worker in workers:
                if worker.sentinel in ending:
                    worker.join(_END_SECONDS)
        # One that has no rows left ends with 0, long before the others.
        expected = getattr(self._iterator, "_workers_status", [])
        return [worker for worker, is_expected in zip(workers, expected, strict=True) if worker.exitcode is not None
                and (is_expected or worker.exitcode != 0 or "exited unexpectedly" in str(error))]


def _describe(worker: BaseProcess) -> str:
    code = worker.exitcode or 0
    return f"pid {worker.pid} " + (f"was killed by {signal.Signals(-code).name}" if code < 0 else
                                   f"exited with code {code}")


def _hint(workers: list[BaseProcess]) -> str:
    codes = [worker.exitcode or 0 for worker in workers]
    names = [signal.Signals(-code).name for code in codes if code < 0]
    return next((_HINTS[name] for name in names if name in _HINTS), "")


def _start_worker(own_init: Callable[[int], None] | None, worker: int) -> None:
    # Ctrl-C, and a SIGTERM for the whole group of processes, are for the training to answer: it finishes its step and
    # saves, and needs its input until then.
    os.setpgid(0, 0)
    # A forked worker has copies of the run's XLA tensors: collecting one would wait for threads that it does not have.
    gc.freeze()
    # What a worker cannot pickle, torch would wait for: a row, or the class of an error that is local to a function.
    Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[method-assign]
    sys.excepthook = _print_error
    info = get_worker_info()
    if info is None or info.num_workers == 1 or not isinstance(info.dataset, IterableDataset):
        if own_init is not None:
            own_init(worker)
        return
    watched, before = _Watched(info), dict(vars(info.dataset))
    torch_worker._worker_info = watched  # type: ignore[assignment]  # that get_worker_info returns
    if own_init is not None:
        own_init(worker)
        now = vars(info.dataset)
        watched.was_asked |= now.keys() != before.keys() or any(now[key] is not before[key] for key in now)
    _check_sharing(info, watched, may_draw=own_init is not None)


def _print_error(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """Prints an error that ends a worker, but not of a connection to a training that has ended in the meantime.

    multiprocessing's own thread, which hands the tensors of batches over, passes such errors to sys.excepthook.
    """
    if not isinstance(error, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, where)


class _Watched:
    """What a dataset asks torch for to take its share of the rows; notes whether it did."""

    def __init__(self, info: Any) -> None:
        self._info, self.was_asked = info, False

    def __getattr__(self, name: str) -> Any:
        self.was_asked = True
        return getattr(self._info, name)


def _check_sharing(info: Any, watched: _Watched, *, may_draw: bool) -> None:
    """Lets an IterableDataset raise at its first row where it gives every worker the same rows.

    Args:
      info: of this worker.
      watched: notes whether it was asked for, by the dataset or by worker_init_fn.
      may_draw: whether rows that are drawn from the random state, which worker_init_fn may have seeded, are the
        worker's own.
    """
    kind = type(info.dataset)
    rows_of = kind.__iter__

    def checked(dataset: Any) -> Iterator[Any]:
        before = ProcessRandomState.take() if may_draw else None
        for row in rows_of(dataset):
            if not watched.was_asked and (before is None or before == ProcessRandomState.take()):
                raise InputError(
                    f"each of {info.num_workers} DataLoader workers reads all rows of {kind.__name__}, so every row "
                    f"would come {info.num_workers} times. Take a share of them in __iter__, by "
                    "torch.utils.data.get_worker_info(), or in worker_init_fn, or set num_workers=1. Where each worker "
                    "is to draw rows of its own, seed them there by get_worker_info().seed.")
            watched.was_asked = True
            yield row

    kind.__iter__ = checked  # type: ignore[method-assign]  # of this process


def _end_worker(error: BaseException, sent: tuple[int, object]) -> None:
    _, batch = sent
    print(batch.exc_msg if isinstance(batch, ExceptionWrapper) else "A batch cannot be sent to the training.",
          file=sys.stderr)
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)
