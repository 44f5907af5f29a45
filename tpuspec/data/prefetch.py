"""Batches made ready ahead of the step, on one thread, where that pays."""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, Self, TypeVar, runtime_checkable

from tpuspec.data.random_state import ProcessRandomState
from tpuspec.spec.phase import note_move

logger = logging.getLogger(__name__)

T = TypeVar("T")


@runtime_checkable
class SupportsClose(Protocol):
    """What can be closed before its end."""

    def close(self) -> None:
        """Lets go of what is held."""
        ...


@runtime_checkable
class DrawsAhead(Protocol):
    """A source that draws ahead itself, from one of its own."""

    def random_state(self) -> ProcessRandomState | None:
        """As `PrefetchedBatches.random_state`."""
        ...

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """As `PrefetchedBatches.paused`."""
        ...


SLOW_DRAW_SECONDS = 250e-6
"""A draw that costs less is cheaper than handing its batch from thread to thread, and Python's lock changes hands."""
_ENOUGH = 8
_CLOSE_SECONDS = 10.0


class PrefetchedBatches(Generic[T]):
    """An iterator that draws from another one: ahead on a thread while that is slow, else when it is asked.

    Order, values and errors are those of the source: an error is raised, the very object, once the batches before it
    were taken. The thread starts when most draws took SLOW_DRAW_SECONDS or longer, and the next ones left the random
    state of the process (Python's, numpy's, torch's) alone. An input that uses it is not drawn ahead, or no longer,
    once that shows: what it draws would depend on how far ahead it is. Give it a generator of its own.

    Args:
      source: drawn from by one thread at a time.
      num_batches: batches that are kept ready; 0 never starts a thread.
      first: batches to yield before those of the source.
      random_state: of the process before `first` were drawn.
      slow_seconds: see above.
      clock: seconds.
    """

    def __init__(self, source: Iterator[T], *, num_batches: int, first: Sequence[T] = (),
                 random_state: ProcessRandomState | None = None,
                 slow_seconds: float = SLOW_DRAW_SECONDS, clock: Callable[[], float] = time.perf_counter) -> None:
        self._source = source
        self._inner = source if isinstance(source, DrawsAhead) else None
        self._num_batches = num_batches
        self._slow_seconds = slow_seconds
        self._clock = clock
        self._ready = collections.deque(first)
        # Of the process, before the last of the ready batches was drawn; None where that drew nothing from it.
        self._random_state = random_state if random_state != ProcessRandomState.take() else None
        self._num_slow = self._num_probed = 0
        self._may_start = num_batches > 0
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        # The rest is guarded by _changed.
        self._stops = self._is_drawing = False
        self._num_pauses = 0
        self._ended: BaseException | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        if self._thread is not None:
            with self._changed:
                while not self._ready and not self._stops:
                    self._changed.wait()
                if self._ready:
                    batch = self._ready.popleft()
                    self._changed.notify_all()
                    return batch
        elif self._ready:
            return self._ready.popleft()
        if self._ended is not None:
            raise StopIteration if isinstance(self._ended, StopIteration) else self._ended
        return self._draw_here()

    def random_state(self) -> ProcessRandomState | None:
        """Returns the random state of the process as it was behind the batch that was taken last.

        None where that is the state as it is now: batches that were drawn ahead drew nothing from it.
        """
        with self._changed:
            if self._ready:
                return self._random_state
        return None if self._inner is None else self._inner.random_state()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Lets no batch be drawn on the thread within the block; waits for one that is being drawn."""
        with self._changed:
            self._num_pauses += 1
            while self._is_drawing:
                self._changed.wait()
        try:
            with contextlib.nullcontext() if self._inner is None else self._inner.paused():
                yield
        finally:
            with self._changed:
                self._num_pauses -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Ends the thread, and closes the source where it can be closed; batches that were drawn ahead are dropped."""
        thread, self._may_start = self._thread, False
        if thread is not None:
            with self._changed:
                self._stops = True
                self._changed.notify_all()
            thread.join(_CLOSE_SECONDS)
            self._ready.clear()
            if thread.is_alive():
                logger.warning("input_fn has not yielded its next batch for %.0f seconds; its thread is left behind.",
                               _CLOSE_SECONDS)
                return
        if isinstance(self._source, SupportsClose):
            self._source.close()

    def _draw_here(self) -> T:
        if not self._may_start:
            return self._draw()
        if self._num_slow < _ENOUGH:
            begun = self._clock()
            batch = self._draw()
            is_slow = self._clock() - begun >= self._slow_seconds
            self._num_slow = self._num_slow + 1 if is_slow else max(0, self._num_slow - 1)
            return batch
        before = ProcessRandomState.take()
        batch = self._draw()
        self._num_probed += 1
        if ProcessRandomState.take() != before:
            self._stay_here()
        elif self._num_probed == _ENOUGH:
            self._start()
        return batch

    def _draw(self) -> T:
        try:
            return next(self._source)
        except BaseException as error:
            self._ended = error
            raise

    def _start(self) -> None:
        self._may_start = False
        self._thread = threading.Thread(target=self._work, name="tpuspec-input", daemon=True)
        self._thread.start()

    def _stay_here(self) -> None:
        self._may_start = False
        logger.info("input_fn draws from the random state of the process, so its batches are not made ready ahead. "
                    "Give it a generator of its own: numpy.random.default_rng, torch.Generator, random.Random.")

    def _work(self) -> None:
        while self._wait_for_turn():
            before = ProcessRandomState.take()
            batches: list[T] = []
            ended: BaseException | None = None
            try:
                batches.append(next(self._source))
            except BaseException as error:
                ended = error
            note_move()
            moved = ProcessRandomState.take() != before
            with self._changed:
                self._ready.extend(batches)
                self._random_state = before if moved else None
                self._ended = ended
                self._is_drawing = False
                self._stops |= moved or ended is not None
                self._changed.notify_all()
            if moved:
                self._stay_here()

    def _wait_for_turn(self) -> bool:
        with self._changed:
            while not self._stops and (len(self._ready) >= self._num_batches or self._num_pauses):
                self._changed.wait()
            self._is_drawing = not self._stops
            return self._is_drawing
