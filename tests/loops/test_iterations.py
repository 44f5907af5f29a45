"""Sizes of device loops: rows TRAIN-13 and TRAIN-14."""

import pytest

from tpuspec.config import parse_iterations_per_loop
from tpuspec.errors import ConfigError
from tpuspec.loops.iterations import IterationCountEstimator, LoopSizer


def sizes(iterations_per_loop, last_step, *, start=0, seconds_per_step=1.0, loops=100):
    """Runs loops until the end, and returns their sizes."""
    sizer, step, found = LoopSizer(parse_iterations_per_loop(iterations_per_loop), last_step), start, []
    while len(found) < loops and (size := sizer.next_size(step)):
        found.append(size)
        step += size
        sizer.finished(size * seconds_per_step, size)
    return found


def estimator_of(*loops, capacity=20):
    estimator = IterationCountEstimator(capacity)
    for runtime_seconds, num_steps in loops:
        estimator.update(runtime_seconds, num_steps)
    return estimator


@pytest.mark.parametrize(("step", "size"), [(0, 3), (2, 3), (4, 1), (5, 0), (6, 0)])
def test_train_13_a_count_is_cut_at_the_last_step(step, size):
    assert LoopSizer(parse_iterations_per_loop(3), 5).next_size(step) == size


@pytest.mark.parametrize(("length", "last_step", "start", "expected"), [
    (3, 5, 0, [3, 2]), (3, 6, 0, [3, 3]), (1, 3, 0, [1, 1, 1]), (100, 7, 0, [7]), (4, 10, 7, [3]), (4, 10, 10, [])])
def test_train_13_loops_of_a_count_end_exactly_at_the_last_step(length, last_step, start, expected):
    assert sizes(length, last_step, start=start) == expected


def test_train_13_the_first_loop_of_a_time_is_one_step_and_the_next_fills_the_time():
    assert sizes("10s", 30, seconds_per_step=0.5) == [1, 20, 9]


def test_train_13_a_time_is_cut_at_the_last_step_too():
    assert sizes("10s", 1) == [1]
    assert sizes("1h", 5, seconds_per_step=0.001) == [1, 4]


def test_a_step_that_takes_longer_than_the_time_makes_loops_of_one():
    assert sizes("1s", 4, seconds_per_step=60) == [1, 1, 1, 1]


def test_without_a_last_step_loops_go_on_in_full():
    assert sizes(3, None, start=1000, loops=5) == [3] * 5


def test_train_14_without_samples_the_estimate_is_one():
    assert IterationCountEstimator().get(10) == 1


@pytest.mark.parametrize("target", [0, -1, -0.5])
def test_train_14_a_target_that_is_not_positive_is_an_error(target):
    with pytest.raises(ConfigError, match=f"target_seconds must be positive; got {target}"):
        estimator_of((5, 1)).get(target)


@pytest.mark.parametrize("loop", [(0, 1), (-1, 1), (1, 0), (1, -1), (float("nan"), 1)])
def test_train_14_samples_without_time_or_steps_are_ignored(loop):
    assert estimator_of(loop).get(10) == 1
    assert estimator_of((5, 1), loop).get(10) == 2


def test_train_14_the_estimate_fills_the_target_and_does_not_depend_on_the_one_before():
    estimator = estimator_of((5, 1))
    assert [estimator.get(target) for target in (10, 15, 10)] == [2, 3, 2]


@pytest.mark.parametrize(("seconds", "target", "count"), [(9, 8, 1), (9, 1, 1), (2, 5, 3), (2, 4.9, 2), (10, 25, 3)])
def test_train_14_the_estimate_is_at_least_one_and_rounds_half_up(seconds, target, count):
    assert estimator_of((seconds, 1)).get(target) == count


def test_train_14_the_step_time_is_the_mean_of_the_samples_ratios():
    assert estimator_of((1, 3), (2, 3)).get(10) == 20
    # (1 + 1/9) / 2 seconds; all seconds over all steps would be 0.2, and 50 steps.
    assert estimator_of((1, 1), (1, 9)).get(10) == 18


def test_train_14_only_the_newest_samples_count():
    assert estimator_of((100, 1), (1, 1), (3, 1), capacity=2).get(10) == 5
    assert estimator_of((100, 1), *[(1, 1)] * 19).get(60) == 10
    assert estimator_of((100, 1), *[(1, 1)] * 20).get(60) == 60


def test_train_14_the_estimate_converges_within_five_updates():
    estimator = IterationCountEstimator()
    for _ in range(5):
        estimator.update(2, 4)
    assert abs(estimator.get(10) * 2 / 4 - 10) <= 1
