"""The arithmetic of the benchmarks whose contenders share a process."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"


@pytest.fixture
def interleave(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import interleave

    return interleave


def test_measures_take_turns_and_each_repeat_begins_with_another_one(interleave):
    calls = []
    measures = {name: lambda name=name: calls.append(name) or len(calls) for name in "abc"}
    assert interleave.interleave(measures, 3) == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}
    assert calls == [*"abc", *"bca", *"cab"]


def test_a_ratio_is_the_median_of_the_ratios_of_each_repeat(interleave):
    assert interleave.median_ratio([7.0, 50.0, 6.0], [1.0, 10.0, 1.0]) == 6.0


def test_costs_are_subtracted_and_shared_out(interleave):
    assert (interleave.Cost(5.0, 3.0) - interleave.Cost(1.0, 1.0)) / 2 == interleave.Cost(2.0, 1.0)


def test_a_cost_counts_wall_and_cpu_time(interleave):
    cost = interleave.Cost.of(lambda: sum(range(100_000)))
    assert cost.wall > 0 and cost.cpu > 0


def test_a_spread_has_median_smallest_and_largest(interleave):
    assert interleave.spread([3.0, 1.0, 2.04], 1) == {"median": 2.0, "spread": [1.0, 3.0], "repeats": 3}


def test_a_table_aligns_names_left_and_numbers_right(interleave):
    assert interleave.table([["w", "c", "ms"], ["cnn", "a", 1.5], ["mlp", "bc", None]]).splitlines() == [
        "w    c    ms", "cnn  a   1.5", "mlp  bc     "]
