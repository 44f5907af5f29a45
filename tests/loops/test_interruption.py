"""Signals within and outside of loops, and what is as before afterwards."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from tpuspec.loops import interruption as module
from tpuspec.loops.interruption import interruptible
from tpuspec.spec.phase import in_phase

pytestmark = pytest.mark.usefixtures("signals_as_in_a_terminal")


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "exception"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_outside_of_a_loop_a_signal_raises_at_once(number, exception):
    with pytest.raises(exception, match=r"^(143)?$"), interruptible(60):
        send(number)
        pytest.fail("not at once")


def test_within_a_loop_it_is_a_stop_request_and_the_second_one_raises():
    stops = []
    with pytest.raises(KeyboardInterrupt, match="^$"), interruptible(60) as interruption:
        with interruption.stops(lambda: stops.append(1)):
            send(signal.SIGINT)
            assert stops == [1] and interruption.is_first
            send(signal.SIGINT)
        pytest.fail("not at once")
    assert stops == [1]


def test_a_request_that_comes_late_is_made_at_once():
    with interruptible(60) as interruption, interruption.stops(lambda: None):
        send(signal.SIGTERM)
        stops = []
        with interruption.stops(lambda: stops.append(1)):
            assert stops == [1]


def test_a_wait_for_input_is_broken_off_and_nothing_else():
    with (interruptible(60) as interruption, interruption.stops(lambda: None), interruption.breaks_off(is_alone=True),
          in_phase("input_fn"), pytest.raises(SystemExit, match="143")):
        send(signal.SIGTERM)
    with (interruptible(60) as interruption, interruption.stops(lambda: None), interruption.breaks_off(is_alone=True),
          in_phase("model_fn")):
        send(signal.SIGTERM)


@pytest.mark.parametrize("is_alone", [True, False])
def test_halfway_through_the_grace_time_a_loop_alone_is_broken_off(is_alone):
    with interruptible(0.4) as interruption, interruption.stops(lambda: None):
        begun = time.monotonic()
        try:
            with interruption.breaks_off(is_alone=is_alone):
                send(signal.SIGINT)
                time.sleep(0.6)
        except KeyboardInterrupt:
            assert is_alone
            assert time.monotonic() - begun >= 0.2
            assert interruption.is_first, "no second one"
        else:
            assert not is_alone


def test_handlers_and_descriptor_are_put_back_after_an_error_too():
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]
    try:
        with pytest.raises(ValueError, match="by the test"), interruptible(60) as interruption:
            with interruption.stops(lambda: None):
                send(signal.SIGTERM)
            raise ValueError("by the test")
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)] == handlers
        assert os.read(read_end, 8) == bytes([signal.SIGTERM]), "who waited for signals before still learns of them"
    finally:
        assert signal.set_wakeup_fd(-1) == write_end
        os.close(read_end)
        os.close(write_end)


def test_blocks_within_one_another_share_the_signal():
    with interruptible(60) as outer, outer.stops(lambda: None):
        with interruptible(5) as inner, inner.stops(lambda: None):
            send(signal.SIGTERM)
        assert inner is outer
        with pytest.raises(SystemExit, match="143"):
            outer.end()


def test_a_signal_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruptible(60) as interruption:
        send(signal.SIGINT)
        assert interruption.signal is None
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_in_another_thread_nothing_changes():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def train():
        with interruptible(60) as interruption, interruption.stops(lambda: None):
            seen.append(signal.getsignal(signal.SIGTERM))
            interruption.end()

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_forked_child_dies_of_sigterm_ignores_ctrl_c_and_keeps_its_signals_to_itself():
    with interruptible(60) as interruption, interruption.stops(lambda: pytest.fail("the parent got no signal")):
        child = os.fork()
        if child == 0:
            send(signal.SIGINT)
            send(signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        time.sleep(0.1)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
        assert interruption.signal is None


def test_a_worker_that_the_same_signal_ended_does_not_break_the_step_under_way():
    def raise_for_a_worker(number, frame):
        raise RuntimeError("DataLoader worker was killed")

    before = signal.signal(signal.SIGCHLD, raise_for_a_worker)
    try:
        with interruptible(60) as interruption, interruption.stops(lambda: None):
            send(signal.SIGTERM)
            send(signal.SIGCHLD)
        with pytest.raises(RuntimeError, match="worker was killed"):
            send(signal.SIGCHLD)
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize(("number", "owns", "ends"), [
    (signal.SIGTERM, False, True), (signal.SIGINT, True, True), (signal.SIGINT, False, False)])
def test_fault_22_when_the_grace_time_is_over_the_process_is_ended(monkeypatch, capfd, number, owns, ends):
    codes = []
    monkeypatch.setattr(module, "end_process", codes.append)
    with interruptible(0.1, owns_process=owns) as interruption, interruption.stops(lambda: None):
        send(number)
        time.sleep(0.5)
    assert codes == ([128 + number] if ends else [])
    assert (f"interrupted by {signal.Signals(number).name}: the process has not come" in capfd.readouterr().err) == ends
