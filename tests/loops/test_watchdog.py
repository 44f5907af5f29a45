"""A watchdog ends what does not move, and only that."""

from __future__ import annotations

import threading
import time

import pytest

from tpuspec.config import RunConfig
from tpuspec.loops.watchdog import Watchdog, make_watchdog
from tpuspec.spec.phase import in_phase, note_move

HUNG = 4


class Ended(threading.Event):
    """Takes the place of the end of the process."""

    def __init__(self):
        super().__init__()
        self.codes = []

    def end(self, code):
        self.codes.append(code)
        self.set()


def test_fault_37_a_run_that_does_not_move_ends_with_the_stacks_of_all_threads(capfd):
    ended, told, stop = Ended(), [], threading.Event()

    def loop_of_the_user():
        stop.wait()

    thread = threading.Thread(target=loop_of_the_user)
    thread.start()
    with (Watchdog({"hang_seconds": 0.1}, tell=lambda error, phase: told.append((str(error), phase)), end=ended.end),
          in_phase("input_fn")):
        assert ended.wait(30)
    stop.set()
    thread.join()
    assert ended.codes == [HUNG]
    err = capfd.readouterr().err
    first, *stacks = err.splitlines()
    assert first.startswith("error: no step, batch or host work has moved for 0 s, in input_fn.")
    assert "raise RunConfig.hang_seconds" in first
    assert any("in loop_of_the_user" in line for line in stacks), "the stack of another thread"
    assert any("test_fault_37" in line for line in stacks), "and of the main thread"
    assert told == [(first.removeprefix("error: "), "input_fn")]


def enter(phase):
    with in_phase(phase):
        pass


@pytest.mark.parametrize("move", [note_move, lambda: enter("model_fn")], ids=["a_step", "a_phase"])
def test_what_moves_is_not_ended(move):
    ended = Ended()
    with Watchdog({"hang_seconds": 0.2}, end=ended.end):
        for _ in range(40):
            time.sleep(0.01)
            move()
    assert ended.codes == []


@pytest.mark.parametrize(("phase", "limits", "ends"), [
    ("compile", {"hang_seconds": 0.05, "compile_hang_seconds": None}, False),
    ("compile", {"hang_seconds": 1000.0, "compile_hang_seconds": 0.05}, True),
    ("save", {"hang_seconds": 0.05, "checkpoint_timeout_secs": 1000.0}, False),
    ("model_fn", {"hang_seconds": None, "compile_hang_seconds": 0.05}, False),
])
def test_a_phase_has_its_own_limit(phase, limits, ends, capfd):
    ended = Ended()
    with Watchdog(limits, end=ended.end), in_phase(phase):
        assert ended.wait(10 if ends else 0.4) == ends
    assert ("RunConfig.compile_hang_seconds" in capfd.readouterr().err) == ends


def test_time_in_which_the_whole_process_stood_still_does_not_count():
    ended, times = Ended(), iter([0.0, *[1000.0 * i for i in range(1, 4)]])
    looked = threading.Event()

    def clock():
        now = next(times, None)
        if now is None:
            looked.set()
            return 3000.0
        return now

    with Watchdog({"hang_seconds": 10.0}, end=ended.end, clock=clock):
        assert looked.wait(20)
    assert ended.codes == []


def test_a_pause_is_not_watched():
    ended = Ended()
    with Watchdog({"hang_seconds": 0.05}, end=ended.end) as watchdog:
        watchdog.pause()
        assert not ended.wait(0.4)
        watchdog.resume()
        assert ended.wait(30)


def test_what_hangs_while_the_others_are_told_does_not_keep_the_process(capfd):
    ended, stop = Ended(), threading.Event()
    with Watchdog({"hang_seconds": 0.05}, tell=lambda error, phase: stop.wait(), end=ended.end):
        assert ended.wait(30)
    stop.set()


def test_without_limits_no_thread_is_started():
    before = threading.active_count()
    with make_watchdog(RunConfig(hang_seconds=None, compile_hang_seconds=None, checkpoint_timeout_secs=None), print):
        assert threading.active_count() == before
