"""Fault 1, with real processes: SIGKILL at random moments loses no commit, and the end is bit-equal."""

from __future__ import annotations

import random
import sys

import pytest

from tests.faults.killed_training import Trainings, differences, finish, kill_once

CASES = [("digits", 1), ("digits", 4), ("gpt_bytes", 1), ("gpt_bytes", 4)]
NUM_KILLS_OF_EACH_CASE = 25


@pytest.fixture(scope="module")
def trainings(zygote):
    return Trainings(zygote)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "num_replicas"), CASES)
def test_fault_01_a_run_that_was_killed_ends_bit_equal(trainings, tmp_path, recipe, num_replicas):
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    finish(trainings, recipe, num_replicas, tmp_path / "whole", 15)
    # The kill comes behind step 12 at the latest: there is something left to go on with.
    kill_once(trainings, recipe, num_replicas, tmp_path / "killed", 15, rng, must_commit=True)
    finish(trainings, recipe, num_replicas, tmp_path / "killed", 15)
    assert differences(tmp_path / "killed", tmp_path / "whole") == [], seed


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("recipe", "num_replicas"), CASES)
def test_fault_01_a_run_that_was_killed_25_times_ends_bit_equal(trainings, tmp_path, recipe, num_replicas, capsys):
    seed = random.randrange(2**32)
    rng, num_kills, kills = random.Random(seed), 0, []
    last_step = 6 * NUM_KILLS_OF_EACH_CASE
    finish(trainings, recipe, num_replicas, tmp_path / "whole", last_step)
    model_dir = tmp_path / "killed 0"
    while num_kills < NUM_KILLS_OF_EACH_CASE:
        # A kill at a start, which commits nothing, is followed by one behind a commit: every state is gone on from.
        killing = kill_once(trainings, recipe, num_replicas, model_dir, last_step, rng,
                            must_commit=not kills or kills[-1].step == kills[-1].killed_at or rng.random() < 0.7)
        kills.append(killing)
        num_kills += killing.killed_at is not None
        with capsys.disabled():
            print(f"{recipe} x{num_replicas} seed {seed}: {num_kills} kills, {killing}", file=sys.stderr, flush=True)
        if killing.killed_at is None:
            assert differences(model_dir, tmp_path / "whole") == []
            model_dir = tmp_path / f"killed {len(kills)}"
    finish(trainings, recipe, num_replicas, model_dir, last_step)
    assert differences(model_dir, tmp_path / "whole") == []
