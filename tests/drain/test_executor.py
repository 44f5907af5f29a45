import logging
import threading
import time

import pytest

from tpuspec.drain.executor import HostExecutor, host_call_error
from tpuspec.errors import HostCallError, SpecTypeError
from tpuspec.testing import ManualClock

WAIT = 10.0  # seconds, for what must happen at once
MOMENT = 0.1  # seconds, for what must not happen


def worker_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("tpuspec-host")]


def test_jobs_run_in_the_order_of_their_submission_on_one_other_thread():
    done: list[tuple[int, int]] = []
    with HostExecutor(queue_size=2) as executor:
        for step in range(50):
            executor.submit(step, lambda step=step: done.append((step, threading.get_ident())))
    assert [step for step, _ in done] == list(range(50))
    assert len({thread for _, thread in done}) == 1
    assert done[0][1] != threading.get_ident()


@pytest.fixture
def patient(monkeypatch):
    """Lets the worker wait for ever until there are enough jobs."""
    monkeypatch.setattr("tpuspec.drain.executor._LINGER_SECONDS", 3600.0)


def test_the_thread_wakes_up_once_enough_jobs_wait(patient):
    done: list[int] = []
    ran = threading.Event()
    with HostExecutor(queue_size=8) as executor:
        assert executor.enough == 4
        for step in (1, 2, 3):
            executor.submit(step, lambda step=step: done.append(step))
        assert not ran.wait(MOMENT) and done == []
        executor.submit(4, ran.set)
        assert ran.wait(WAIT) and done == [1, 2, 3]


@pytest.mark.parametrize("ask", [HostExecutor.wait, HostExecutor.close])
def test_jobs_that_somebody_waits_for_run_at_once(patient, ask):
    done: list[int] = []
    executor = HostExecutor(queue_size=8)
    for step in (1, 2):
        executor.submit(step, lambda step=step: done.append(step))
        ask(executor)
    assert done == [1, 2]
    executor.close()


def test_a_single_job_runs_after_a_moment():
    ran = threading.Event()
    with HostExecutor(queue_size=8) as executor:
        for _ in range(3):  # the first starts the thread; the others find it asleep
            ran.clear()
            executor.submit(1, ran.set)
            assert ran.wait(WAIT)
            time.sleep(MOMENT)


def test_close_waits_for_the_queued_jobs():
    done: list[int] = []
    gate = threading.Event()
    executor = HostExecutor()
    executor.submit(1, lambda: gate.wait(WAIT))
    executor.submit(2, lambda: done.append(2))
    threading.Timer(MOMENT, gate.set).start()
    executor.close()
    assert done == [2]


def test_a_full_queue_makes_submit_wait_until_a_job_is_taken():
    executor = HostExecutor(queue_size=1)
    started, gate, submitted = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        started.set()
        assert gate.wait(WAIT)

    executor.submit(1, first)
    assert started.wait(WAIT)
    executor.submit(2, lambda: None)  # fills the queue

    def third() -> None:
        executor.submit(3, lambda: None)
        submitted.set()

    submitter = threading.Thread(target=third)
    submitter.start()
    assert not submitted.wait(MOMENT)
    gate.set()
    assert submitted.wait(WAIT)
    submitter.join()
    executor.close()


def fill(executor: HostExecutor, clock: ManualClock, *waits: float) -> None:
    """Submits jobs behind one that runs, each into a full queue that has room again after so many seconds."""
    for step, seconds in enumerate(waits, start=1):
        gate, started = threading.Event(), threading.Event()

        def hold(started=started, gate=gate, seconds=seconds) -> None:
            started.set()
            assert gate.wait(WAIT)
            clock.advance(seconds)

        executor.submit(step, hold)
        assert started.wait(WAIT)
        executor.submit(step, lambda: None)  # fills the queue
        threading.Timer(MOMENT, gate.set).start()
        executor.submit(step, lambda: None)  # waits
        executor.wait()


def test_a_full_queue_is_told_once_with_the_share_of_time(caplog):
    clock = ManualClock()
    with caplog.at_level(logging.WARNING, "tpuspec"), HostExecutor(queue_size=1, clock=clock) as executor:
        fill(executor, clock, 0.75)
        assert caplog.text == ""
        clock.advance(1.5)
        fill(executor, clock, 0.75, 3.0)
    assert [record.getMessage() for record in caplog.records] == [
        "host work is slower than the device: the loop waited for it 50 % of the time so far, its queue of 1 steps "
        "being full. Make host_call or metric_fn cheaper, or call host_call less often "
        "(TPUConfig.host_call_every_n_steps)."]


def test_a_queue_that_is_rarely_full_is_not_told(caplog):
    clock = ManualClock()
    with caplog.at_level(logging.WARNING, "tpuspec"), HostExecutor(queue_size=1, clock=clock) as executor:
        fill(executor, clock, 0.01)
        clock.advance(1000)
        fill(executor, clock, 5.0)
    assert caplog.text == ""


def test_time_that_the_jobs_wait_for_the_device_is_not_told(caplog):
    clock = ManualClock()
    with caplog.at_level(logging.WARNING, "tpuspec"), HostExecutor(queue_size=1, clock=clock) as executor:
        gate, started = threading.Event(), threading.Event()

        def hold() -> None:
            with executor.waiting_for_device():
                started.set()
                assert gate.wait(WAIT)
                clock.advance(60.0)
            clock.advance(0.5)

        executor.submit(1, hold)
        assert started.wait(WAIT)
        executor.submit(2, lambda: None)
        threading.Timer(MOMENT, gate.set).start()
        executor.submit(3, lambda: None)  # waits
        executor.wait()
        assert caplog.text == "", "60 s for the device, and only 0.5 s for the job"
        fill(executor, clock, 60.0)
    assert "waited for it 50 % of the time" in caplog.text


def test_a_job_that_raises_while_it_waits_for_the_device_is_an_error_like_any_other():
    executor = HostExecutor()

    def job() -> None:
        with executor.waiting_for_device():
            raise OSError("gone")

    executor.submit(4, job)
    with pytest.raises(HostCallError, match="step 4 raised OSError: gone"):
        executor.close()


def test_wait_leaves_as_many_jobs_as_may_be_under_way():
    with HostExecutor() as executor:
        gate = threading.Event()
        executor.submit(1, lambda: None)
        executor.submit(2, lambda: gate.wait(WAIT))
        executor.wait(left=1)
        assert executor.num_under_way == 1
        gate.set()
        executor.wait()
        assert executor.num_under_way == 0


def test_check_raises_the_error_of_a_job():
    executor = HostExecutor()
    executor.check()
    executor.submit(7, fail)
    executor.wait()
    with pytest.raises(HostCallError, match="step 7"):
        executor.check()
    executor.check()
    executor.close()


def fail() -> None:
    raise ZeroDivisionError("my fault")


def submit_until_it_raises(executor: HostExecutor) -> None:
    """Submits a failing job of step 7 and three more; with a queue of one job the last comes after the failure."""
    executor.submit(7, fail)
    for step in (8, 9, 10):
        executor.submit(step, lambda: None)


def test_an_error_is_raised_by_a_later_submit_and_names_the_step():
    executor = HostExecutor(queue_size=1)
    with pytest.raises(HostCallError, match="host work of step 7 raised ZeroDivisionError: my fault") as caught:
        submit_until_it_raises(executor)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    executor.close()


def test_an_error_of_the_last_job_is_raised_by_close():
    executor = HostExecutor()
    executor.submit(7, fail)
    with pytest.raises(HostCallError, match="step 7"):
        executor.close()
    assert worker_threads() == []


def test_an_error_of_the_last_job_is_raised_at_the_end_of_the_with_block():
    with pytest.raises(HostCallError, match="step 7"), HostExecutor() as executor:
        executor.submit(7, fail)


def test_jobs_behind_an_error_are_dropped():
    executor, gate, behind = HostExecutor(), threading.Event(), []

    def fail_late() -> None:
        assert gate.wait(WAIT)
        fail()

    executor.submit(7, fail_late)
    executor.submit(8, lambda: behind.append(8))
    gate.set()
    with pytest.raises(HostCallError, match="step 7"):
        executor.close()
    assert behind == []


def test_the_first_of_two_errors_is_the_one_that_is_raised():
    executor, gate = HostExecutor(), threading.Event()

    def fail_late(message: str) -> None:
        assert gate.wait(WAIT)
        raise ValueError(message)

    executor.submit(1, lambda: fail_late("first"))
    executor.submit(2, lambda: fail_late("second"))
    gate.set()
    with pytest.raises(HostCallError, match="step 1 raised ValueError: first"):
        executor.close()


def test_an_error_is_raised_once():
    executor = HostExecutor(queue_size=1)
    with pytest.raises(HostCallError, match="step 7"):
        submit_until_it_raises(executor)
    executor.submit(11, lambda: None)
    executor.close()
    executor.close()


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt("stop"), SpecTypeError("a rule"),
                                   HostCallError("named already")])
def test_an_error_that_ends_the_process_or_is_tpuspecs_own_is_raised_as_it_is(error):
    executor = HostExecutor()

    def raise_it() -> None:
        raise error

    executor.submit(1, raise_it)
    with pytest.raises(type(error), match=str(error)) as caught:
        executor.close()
    assert caught.value is error


def test_an_error_on_its_way_out_of_the_block_wins_and_the_workers_is_logged(caplog):
    with (caplog.at_level(logging.WARNING, "tpuspec"), pytest.raises(KeyError, match="first"),
          HostExecutor() as executor):
        executor.submit(7, fail)
        raise KeyError("first")
    assert "while KeyError was on its way, host work failed too" in caplog.text
    assert "step 7" in caplog.text
    assert worker_threads() == []


def test_the_workers_own_error_on_its_way_out_of_the_block_is_not_logged_again(caplog):
    with pytest.raises(HostCallError, match="step 7"), HostExecutor(queue_size=1) as executor:
        submit_until_it_raises(executor)
    assert caplog.text == ""


def test_no_thread_is_started_without_a_job_and_none_is_left():
    with HostExecutor() as executor:
        assert worker_threads() == []
        executor.submit(1, lambda: None)
        assert worker_threads() == ["tpuspec-host"]
    assert worker_threads() == []


def test_an_executor_can_be_used_again_after_close():
    executor, done = HostExecutor(), []
    executor.submit(1, fail)
    with pytest.raises(HostCallError, match="step 1"):
        executor.close()
    executor.submit(2, lambda: done.append(2))
    executor.close()
    assert done == [2]


def test_the_error_of_a_host_function_says_which_and_when():
    assert str(host_call_error("metric_fn", 3, ValueError("x"))) == "metric_fn raised ValueError at step 3: x"
    assert str(host_call_error("host_call", 3, ValueError("x"), global_step=2)) == (
        "host_call raised ValueError at step 3 (global_step 2 before its update): x")
