"""SIGTERM and SIGINT to real runs, in every part of them: the last finished step is committed, and nothing lives on."""

from __future__ import annotations

import re
import signal

import pytest

pytestmark = pytest.mark.slow

NATIVE = "use_tpu=false"
SECONDS_AT_ONCE = 10.0
MOST_SECONDS = 20.0  # which the project promises; the default grace time is 15


@pytest.mark.parametrize("arguments", [
    ["params.place=input_fn", "params.step=1"],
    ["params.place=model_fn", NATIVE],
    ["params.place=compile"],
    ["params.place=save"],
    ["params.place=host_call", "params.step=45"],
    ["params.place=metric_fn"],
    ["params.place=evaluate"],
], ids=["before_the_first_step", "model_fn", "first_compile", "save", "step", "eval", "start_of_eval"])
def test_fault_22_sigterm_in_any_phase_commits_the_last_finished_step_and_ends_with_143(commands, tmp_path, arguments):
    ended = commands.run(tmp_path, "quiet=true", "params.how=SIGTERM", *arguments)
    assert ended.code == 143
    assert ended.first_line.startswith("interrupted by SIGTERM: stopped at step ")
    step = ended.last_step()
    assert ended.seconds < MOST_SECONDS
    assert step == 0 or "params.step=1" not in arguments
    assert step >= 45 or "params.step=45" not in arguments


def test_fault_22_a_run_that_sigterm_ended_goes_on_from_there(commands, tmp_path):
    first = commands.run(tmp_path, "quiet=true", "mode=train", NATIVE, "params.how=SIGTERM", "params.place=host_call")
    step = first.last_step()
    second = commands.run(tmp_path, "quiet=true", "mode=train", NATIVE, f"run.max_steps={step + 3}")
    assert (second.code, second.steps()[-1]) == (0, step + 3)


def test_fault_23_ctrl_c_in_a_terminal_reaches_the_workers_too_and_ends_with_130(commands, tmp_path):
    run = commands.start(tmp_path, "mode=train", "params.num_workers=2", NATIVE, "run.log_step_count_steps=1")
    run.wait_for(lambda: "step 8" in run.output())
    run.send(signal.SIGINT, to_group=True)
    ended = run.wait()
    assert (ended.code, ended.first_line[:22]) == (130, "interrupted by SIGINT:")
    assert ended.last_step() >= 8
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_fault_22_23_a_whole_group_that_is_signalled_saves_and_leaves_no_worker(commands, tmp_path, number):
    run = commands.start(tmp_path, "mode=train", "params.num_workers=2", "run.log_step_count_steps=1")
    run.wait_for(lambda: "step 8" in run.output())
    run.send(number, to_group=True)
    ended = run.wait()
    assert ended.code == 128 + number
    assert ended.last_step() >= 8
    assert ended.seconds < MOST_SECONDS


def test_fault_24_a_second_signal_ends_at_once_without_another_commit(commands, tmp_path):
    ended = commands.run(tmp_path, "quiet=true", "mode=train", "params.how=twice", "params.place=host_call",
                         "params.step=45", "run.save_checkpoints_steps=40", NATIVE)
    assert ended.code == 143
    assert ended.seconds < SECONDS_AT_ONCE, "from the second signal"
    assert ended.steps() in ([0], [0, 40])


def test_fault_22_a_compile_that_outlasts_the_grace_time_is_ended_and_the_first_state_is_committed(commands, tmp_path):
    run = commands.start(tmp_path, "quiet=true", "mode=train", "params.num_layers=3000", "run.grace_seconds=1",
                         "params.place=compile", "params.how=SIGTERM", "run.compile_cache=null")
    ended = run.wait()
    assert ended.code == 143
    # By itself where the compiler comes back to Python in time; the signal may come as its phase ends.
    assert re.search(r"interrupted by SIGTERM: (the process has not come to its end in time|broken off) \(in \w+\)",
                     ended.err)
    assert ended.steps() == [0]


@pytest.mark.parametrize(("use_tpu", "told"), [
    (True, "host functions are too slow to be waited for"), (False, "interrupted by SIGTERM: stopped at step 5,")])
def test_fault_22_a_host_call_that_hangs_does_not_keep_the_last_step_from_its_commit(commands, tmp_path, use_tpu, told):
    run = commands.start(tmp_path, "mode=train", "params.place=host_call", "params.how=hang", "run.grace_seconds=10",
                         "run.host_queue_size=2", f"use_tpu={use_tpu}", "run.log_step_count_steps=1")
    run.wait_for(lambda: "step 4" in run.output())
    run.send(signal.SIGTERM)
    ended = run.wait()
    assert ended.code == 143
    assert told in ended.err
    assert ended.steps()[-1] >= 5
