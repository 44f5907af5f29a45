import pytest

from tpuspec.checkpoint.policy import RetentionPolicy, SavePolicy
from tpuspec.errors import ConfigError

HOUR = 3600.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def _saves(policy: SavePolicy, steps: list[int]) -> list[int]:
    done = []
    for step in steps:
        if policy.should_save(step):
            policy.saved(step)
            done.append(step)
    return done


@pytest.mark.parametrize(("every", "boundaries", "expected"), [
    (10, range(0, 27), [0, 10, 20]),
    (10, range(5, 30, 5), [5, 15, 25]),
    (10, range(0, 50, 7), [0, 14, 28, 42]),
    (1, range(3), [0, 1, 2]),
])
def test_saves_when_n_steps_have_passed_since_the_last(every, boundaries, expected):
    assert _saves(SavePolicy(every, None), list(boundaries)) == expected


def test_saves_when_n_seconds_have_passed_since_the_last():
    clock = Clock()
    policy = SavePolicy(None, 60, clock=clock)
    saved = []
    for step in range(10):
        if policy.should_save(step):
            policy.saved(step)
            saved.append(step)
        clock.now += 25
    assert saved == [0, 3, 6, 9]


def test_with_both_distances_the_nearer_one_saves():
    clock = Clock()
    policy = SavePolicy(10, 60, clock=clock)
    policy.saved(0)
    assert not policy.should_save(9)
    assert policy.should_save(10)
    clock.now += 60
    assert policy.should_save(1)


def test_one_step_is_never_saved_twice():
    clock = Clock()
    policy = SavePolicy(1, 1, clock=clock)
    policy.saved(7)
    clock.now += 1000
    assert not policy.should_save(7)
    assert not policy.should_save_last(7)


def test_the_distance_counts_from_a_restored_step():
    policy = SavePolicy(10, None)
    policy.saved(95)
    assert _saves(policy, list(range(95, 120))) == [105, 115]


@pytest.mark.parametrize("every_steps", [None, 0])
@pytest.mark.parametrize("every_seconds", [None, 0])
def test_without_a_distance_it_never_saves(every_steps, every_seconds):
    policy = SavePolicy(every_steps, every_seconds)
    assert not policy.enabled
    assert not policy.should_save(0)
    assert not policy.should_save_last(5)


def test_the_last_step_is_saved_unless_it_is_already():
    policy = SavePolicy(10, None)
    policy.saved(20)
    assert policy.last_saved_step == 20
    assert policy.should_save_last(26)
    assert not policy.should_save_last(20)


@pytest.mark.parametrize("kwargs", [{"every_steps": -1, "every_seconds": None},
                                    {"every_steps": None, "every_seconds": -0.5},
                                    {"every_steps": None, "every_seconds": float("nan")}])
def test_negative_distances_are_refused(kwargs):
    with pytest.raises(ConfigError, match=r"SavePolicy.every_\w+ must be >= 0, or None; got"):
        SavePolicy(**kwargs)


@pytest.mark.parametrize(("max_to_keep", "hours", "times", "expected"), [
    (2, None, [0, 1, 2, 3], [0, 1]),
    (5, None, [0, 1, 2], []),
    (1, None, [0], []),
    (1, None, [], []),
    (None, None, [0, 1, 2], []),
    (0, 1, [0, 1, 2], []),
    (1, 10000, [0, 1, 2], [0, 1]),
    # Minutes 0, 40, ...: the first after each full hour stays.
    (1, 1, [0, 40 / 60, 80 / 60, 2, 160 / 60, 200 / 60, 4], [0, 1, 3]),
    # Saves rarer than the hours all stay, save the one at the start.
    (1, 1, [0, 3, 6, 9, 12], [0]),
    # After a pause of a week the hours go on from there.
    (1, 1, [0, 0.5, 168.1, 168.5, 168.9, 169.1, 170], [0, 1, 3, 4]),
    # Exactly on the hour is not yet after it.
    (1, 1, [0, 1, 2, 3], [0, 1]),
])
def test_keeps_the_newest_and_one_for_every_n_hours(max_to_keep, hours, times, expected):
    policy = RetentionPolicy(max_to_keep=max_to_keep, keep_every_n_hours=hours)
    assert policy.steps_to_delete([(step, 50 + t * HOUR) for step, t in enumerate(times)], 50.0) == expected


def test_newest_means_the_highest_step_whatever_the_clock_said():
    policy = RetentionPolicy(max_to_keep=1, keep_every_n_hours=None)
    assert policy.steps_to_delete([(30, 5.0), (10, 99.0), (20, 7.0)], 0.0) == [10, 20]


@pytest.mark.parametrize("max_to_keep", [1, 3])
@pytest.mark.parametrize("minutes", [7, 25, 60, 150])
def test_what_was_kept_for_its_hours_stays_kept(max_to_keep, minutes):
    policy = RetentionPolicy(max_to_keep=max_to_keep, keep_every_n_hours=1)
    kept: list[tuple[int, float]] = []
    everything = []
    for step in range(60):
        kept.append((step, step * minutes * 60.0))
        everything.append(kept[-1])
        deleted = policy.steps_to_delete(kept, 0.0)
        kept = [one for one in kept if one[0] not in deleted]
    at_once = policy.steps_to_delete(everything, 0.0)
    assert [step for step, _ in kept] == [step for step, _ in everything if step not in at_once]


@pytest.mark.parametrize(("kwargs", "why"), [
    ({"max_to_keep": -1}, "max_to_keep must be >= 0, or None; got -1"),
    ({"keep_every_n_hours": 0}, "keep_every_n_hours must be > 0, or None; got 0"),
])
def test_bad_retention_is_refused(kwargs, why):
    with pytest.raises(ConfigError, match=why):
        RetentionPolicy(**kwargs)
