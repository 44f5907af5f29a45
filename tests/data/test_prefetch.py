import random
import threading
import time
import traceback

import numpy as np
import pytest
import torch

from tpuspec.data import prefetch
from tpuspec.data.prefetch import PrefetchedBatches

BEFORE_THREAD = 16  # draws that show that the input is slow, and leaves the random state alone


def slow(source, **options):
    """Batches of an input of which every draw counts as slow."""
    return PrefetchedBatches(iter(source), **{"num_batches": 2, "slow_seconds": 0.0, **options})


def input_threads():
    return [thread for thread in threading.enumerate() if thread.name == "tpuspec-input"]


def wait_for(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Source:
    """Counts up, and says how far; raises `error` at the end."""

    def __init__(self, num_batches, error=None):
        self.num_batches, self.error, self.num_drawn = num_batches, error, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.num_drawn == self.num_batches:
            raise self.error or StopIteration
        self.num_drawn += 1
        return self.num_drawn - 1


def test_order_and_number_are_those_of_the_source_and_the_thread_ends_with_it():
    batches = slow(range(100), first=[-1])
    assert list(batches) == [-1, *range(100)]
    assert list(batches) == []
    batches.close()
    assert not input_threads()


def test_a_slow_input_is_drawn_as_far_ahead_as_asked_and_no_farther():
    source = Source(100)
    batches = slow(source, num_batches=3)
    taken = [next(batches) for _ in range(BEFORE_THREAD)]
    wait_for(lambda: source.num_drawn == BEFORE_THREAD + 3)
    time.sleep(0.02)
    assert source.num_drawn == BEFORE_THREAD + 3
    assert taken == list(range(BEFORE_THREAD)) and next(batches) == BEFORE_THREAD
    batches.close()
    assert not input_threads()


@pytest.mark.parametrize("options", [{"num_batches": 0}, {"slow_seconds": 1000.0}])
def test_without_prefetch_or_need_batches_are_drawn_when_they_are_asked_for(options):
    source = Source(50)
    batches = slow(source, **options)
    for i in range(40):
        assert next(batches) == i
        assert source.num_drawn == i + 1
    assert not input_threads()


def test_a_single_slow_draw_starts_no_thread():
    times = iter([0.0, 1.0, *[2.0] * 1000])
    batches = PrefetchedBatches(iter(range(100)), num_batches=2, slow_seconds=0.5, clock=lambda: next(times))
    assert list(batches) == list(range(100))
    assert batches._thread is None


def raise_in_input():
    yield from range(BEFORE_THREAD + 1)
    raise ZeroDivisionError("of the user")


@pytest.mark.parametrize("num_batches", [0, 2])
def test_an_error_is_the_inputs_own_behind_the_batches_before_it_with_its_traceback(num_batches):
    batches = slow(raise_in_input(), num_batches=num_batches)
    assert [next(batches) for _ in range(BEFORE_THREAD + 1)] == list(range(BEFORE_THREAD + 1))
    with pytest.raises(ZeroDivisionError, match="of the user") as caught:
        next(batches)
    assert "raise_in_input" in "".join(traceback.format_exception(caught.value))
    batches.close()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), ValueError("x")])
def test_any_error_of_the_thread_is_raised_as_the_same_object(error):
    batches = slow(Source(BEFORE_THREAD + 2, error=error))
    with pytest.raises(type(error)) as caught:
        list(batches)
    assert caught.value is error
    batches.close()
    assert not input_threads()


def test_close_while_the_thread_waits_for_room_or_before_it_started():
    for num_taken in (0, 3, BEFORE_THREAD, BEFORE_THREAD + 5):
        batches = slow(range(100))
        for _ in range(num_taken):
            next(batches)
        batches.close()
        batches.close()
        assert not input_threads()


def test_close_does_not_wait_for_ever_for_an_input_that_hangs(monkeypatch, caplog):
    monkeypatch.setattr(prefetch, "_CLOSE_SECONDS", 0.05)
    inside, release = threading.Event(), threading.Event()

    def hang():
        yield from range(BEFORE_THREAD)
        inside.set()
        release.wait()

    batches = slow(hang())
    for _ in range(BEFORE_THREAD):
        next(batches)
    inside.wait()
    batches.close()
    assert "its thread is left behind" in caplog.text
    release.set()
    wait_for(lambda: not input_threads())


def test_nothing_is_drawn_on_the_thread_while_it_is_paused():
    source = Source(1000)
    batches = slow(source, num_batches=5)
    for _ in range(BEFORE_THREAD):
        next(batches)
    with batches.paused():
        drawn = source.num_drawn
        while batches._ready:
            next(batches)
        time.sleep(0.02)
        assert source.num_drawn == drawn
    assert next(batches) == drawn
    batches.close()


def test_pausing_waits_for_the_draw_under_way():
    inside, release = threading.Event(), threading.Event()

    def source():
        yield from range(BEFORE_THREAD)
        inside.set()
        release.wait()
        yield BEFORE_THREAD

    batches = slow(source())
    for _ in range(BEFORE_THREAD):
        next(batches)
    inside.wait()
    threading.Timer(0.05, release.set).start()
    with batches.paused():
        assert release.is_set()
    assert list(batches) == [BEFORE_THREAD]
    batches.close()


DRAWS = {"python": random.random, "numpy": np.random.rand, "torch": lambda: torch.rand(1)}


@pytest.mark.parametrize("name", DRAWS)
def test_an_input_that_uses_the_random_state_of_the_process_is_not_drawn_ahead(name):
    source = (i for i in range(100) if DRAWS[name]() is not None)
    batches = slow(source)
    assert list(batches) == list(range(100))
    assert batches._thread is None


def test_an_input_that_uses_it_later_is_no_longer_drawn_ahead():
    drawn = []

    def source():
        for i in range(200):
            if i == 60:
                random.random()
            drawn.append(i)
            yield i

    batches = slow(source())
    assert [next(batches) for _ in range(100)] == list(range(100))
    assert len(drawn) == 100
    assert list(batches) == list(range(100, 200))
    batches.close()
