from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch

from tpuspec.drain.drain import Drain, DrainedStep, join_micro_steps
from tpuspec.drain.executor import HostExecutor
from tpuspec.errors import DeviceError, HostCallError, InputError
from tpuspec.spec.results import HostFunctions, StepOutput, StepRows
from tpuspec.testing import FakeBackend, ManualClock

WAIT = 10.0  # seconds, for what must happen at once


def output(value: float, *, is_update: bool = True, functions: HostFunctions | None = None) -> StepOutput:
    return StepOutput(tensors={"loss": torch.tensor(value), "host_call": [torch.tensor([value])]}, is_update=is_update,
                      functions=functions or HostFunctions())


def rows(num_rows: int = 2) -> StepRows:
    return StepRows(mask=torch.ones(num_rows, dtype=torch.bool), num_rows=num_rows)


def losses(step: DrainedStep) -> list[float]:
    return step.join("loss").tolist()


class Recorder:
    """Drains steps, notes which the worker fetched together, and holds its work back until the gate is open."""

    def __init__(self, queue_size: int = 64, **options: Any) -> None:
        self.fetches: list[list[float]] = []
        self.fetch_threads: set[int] = set()
        self.steps: list[DrainedStep] = []
        self.gate, self.working = threading.Event(), threading.Event()
        self.gate.set()
        self.executor = HostExecutor(queue_size=queue_size)
        self.drain = Drain(self._fetch, self.executor, work=self._work, **options)

    def _fetch(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        self.fetches.append([tensor.item() for tensor in tensors])
        self.fetch_threads.add(threading.get_ident())
        return [tensor.clone() for tensor in tensors]

    def _work(self, step: DrainedStep) -> None:
        self.working.set()
        assert self.gate.wait(WAIT)
        self.steps.append(step)

    def run(self, *steps: int) -> None:
        for step in steps:
            self.drain.submit(step, [output(step)], rows())

    def close(self) -> None:
        self.executor.close()


def test_the_worker_fetches_and_works_on_each_step_in_order():
    recorder = Recorder()
    recorder.run(*range(1, 50))
    recorder.drain.flush()
    assert [step.step for step in recorder.steps] == list(range(1, 50))
    assert [losses(step) for step in recorder.steps] == [[step] for step in range(1, 50)]
    assert recorder.fetch_threads.isdisjoint({threading.get_ident()})
    recorder.close()


def run_three_behind_one(recorder):
    """Submits steps 2, 3 and 4 while the worker is busy with step 1."""
    recorder.gate.clear()
    recorder.run(1)
    assert recorder.working.wait(WAIT)
    recorder.run(2, 3, 4)
    recorder.gate.set()
    recorder.close()


def test_steps_that_wait_are_fetched_in_one_transfer():
    recorder = Recorder()
    run_three_behind_one(recorder)
    assert recorder.fetches == [[1, 1], [2, 2, 3, 3, 4, 4]]
    assert [step.step for step in recorder.steps] == [1, 2, 3, 4]


def test_at_most_half_of_what_may_be_under_way_is_fetched_at_once():
    recorder = Recorder(queue_size=4)
    run_three_behind_one(recorder)
    assert recorder.fetches == [[1, 1], [2, 2, 3, 3], [4, 4]]
    assert [step.step for step in recorder.steps] == [1, 2, 3, 4]


@pytest.mark.parametrize(("fetch_seconds", "work_seconds", "is_told"), [(5.0, 0.0, False), (0.0, 5.0, True)])
def test_a_loop_that_waits_for_the_device_is_not_told_that_host_work_is_slow(
        caplog, fetch_seconds, work_seconds, is_told):
    clock, gate, begun = ManualClock(), threading.Event(), threading.Event()

    def hold(seconds: float) -> None:
        if seconds:
            begun.set()
            assert gate.wait(WAIT)
            clock.advance(seconds)

    def fetch(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        hold(fetch_seconds)
        return tensors

    with caplog.at_level(logging.WARNING, "tpuspec"), HostExecutor(queue_size=1, clock=clock) as executor:
        drain = Drain(fetch, executor, work=lambda step: hold(work_seconds))
        drain.submit(1, [output(1)], rows())
        assert begun.wait(WAIT)
        drain.submit(2, [output(2)], rows())
        threading.Timer(0.1, gate.set).start()
        drain.submit(3, [output(3)], rows())  # waits
    assert ("host work is slower than the device" in caplog.text) == is_told


def test_all_replicas_of_a_step_come_in_one_fetch():
    backend = FakeBackend(num_replicas=3)
    steps: list[DrainedStep] = []
    with HostExecutor() as executor:
        Drain(backend.fetch, executor, work=steps.append).submit(1, [output(i) for i in range(3)], rows(3))
    assert backend.events == ["fetch"]
    assert losses(steps[0]) == [0, 1, 2]
    assert steps[0].mean_loss() == 1.0
    assert steps[0].join("host_call")[0].tolist() == [0, 1, 2]


def test_containers_come_back_as_they_are():
    steps: list[DrainedStep] = []
    made = StepOutput(tensors={"predictions": {"b": torch.tensor([1]), "a": torch.tensor([2])}, "host_call": [],
                               "eval_metrics": [torch.tensor([3]), torch.tensor([4])]})
    with HostExecutor() as executor:
        Drain(FakeBackend().fetch, executor, work=steps.append).submit(1, [made], rows(1))
    assert steps[0].join("predictions") == {"b": torch.tensor([1]), "a": torch.tensor([2])}
    assert list(steps[0].join("predictions")) == ["b", "a"]
    assert steps[0].join("eval_metrics") == [torch.tensor([3]), torch.tensor([4])]
    assert steps[0].join("host_call") == []
    assert "loss" not in steps[0] and "host_call" in steps[0]


def test_flush_waits_for_the_work_of_all_steps():
    recorder = Recorder()
    recorder.gate.clear()
    recorder.run(1, 2)
    threading.Timer(0.1, recorder.gate.set).start()
    recorder.drain.flush()
    assert len(recorder.steps) == 2
    recorder.drain.flush()
    recorder.close()


def test_the_worker_gets_the_functions_and_rows_of_that_very_step():
    recorder = Recorder()
    functions = [HostFunctions(host_call=print), HostFunctions(host_call=repr)]
    for step, (made, real) in enumerate(zip(functions, [rows(3), rows(1)], strict=True), start=1):
        recorder.drain.submit(step, [output(step, functions=made)], real)
    recorder.close()
    assert [step.functions.host_call for step in recorder.steps] == [print, repr]
    assert [step.rows.num_rows for step in recorder.steps] == [3, 1]


@pytest.mark.parametrize(("every", "start", "expected"), [
    (1, 0, [0, 1, 2, 3, 4, 5]), (2, 0, [0, 2, 4]), (4, 0, [0, 4]), (2, 3, [4, 6, 8]), (10, 3, [])])
def test_host_call_tensors_are_fetched_on_every_nth_global_step_counted_before_its_update(every, start, expected):
    recorder = Recorder(host_call_every=every)
    recorder.run(*range(start + 1, start + 7))
    recorder.close()
    assert [step.step - 1 for step in recorder.steps if "host_call" in step] == expected
    assert sum(map(len, recorder.fetches)) == 6 + len(expected)


def test_of_copies_the_first_one_is_taken():
    recorder = Recorder(copies=2)
    recorder.drain.submit(1, [output(1), output(2)], rows())
    recorder.close()
    assert losses(recorder.steps[0]) == [1]


def test_of_copies_all_micro_batches_of_the_first_one_are_taken():
    recorder = Recorder(copies=2)
    recorder.drain.submit(1, join_micro_steps([[output(1), output(2)], [output(3), output(4)]]), rows())
    recorder.close()
    assert losses(recorder.steps[0]) == [1, 3]


def test_an_error_of_the_work_is_raised_by_a_later_submit_and_names_the_step():
    def work(step: DrainedStep) -> None:
        raise ValueError(f"in {step.step}")

    executor = HostExecutor()
    drain = Drain(FakeBackend().fetch, executor, work=work)
    with pytest.raises(HostCallError, match="step 1 raised ValueError: in 1"):
        for step in range(1, 1000):
            drain.submit(step, [output(step)], rows())
    executor.close()


def test_an_error_of_the_work_is_raised_by_flush():
    executor = HostExecutor()
    drain = Drain(FakeBackend().fetch, executor, work=lambda step: 1 / 0)
    drain.submit(1, [output(1)], rows())
    with pytest.raises(HostCallError, match="step 1 raised ZeroDivisionError"):
        drain.flush()
    executor.close()


def fetch_that_raises(error: Exception) -> Any:
    def fetch(tensors: Any) -> Any:
        raise error

    return fetch


def test_an_error_of_the_fetch_names_the_step_and_keeps_its_cause():
    error, executor = OSError("the device is gone"), HostExecutor()
    Drain(fetch_that_raises(error), executor, work=lambda step: None).submit(5, [output(1)], rows())
    with pytest.raises(DeviceError, match="outputs of step 5 could not be brought .*: OSError: the device is gone"
                       ) as caught:
        executor.close()
    assert caught.value.__cause__ is error


def test_a_rule_broken_in_the_fetch_is_raised_as_it_is():
    error, executor = InputError("a rule"), HostExecutor()
    Drain(fetch_that_raises(error), executor, work=lambda step: None).submit(1, [output(1)], rows())
    with pytest.raises(InputError, match="a rule") as caught:
        executor.close()
    assert caught.value is error


def loss_values(outputs: list[StepOutput]) -> list[float]:
    return [output.tensors["loss"].item() for output in outputs]


def test_one_micro_step_is_the_step():
    assert loss_values(join_micro_steps([[output(1), output(2)]])) == [1, 2]


def test_micro_steps_are_ordered_by_replica_then_batch_and_keep_the_updates_functions():
    functions = HostFunctions(host_call=print)
    joined = join_micro_steps([[output(1, is_update=False), output(3, is_update=False)],
                               [output(2, functions=functions), output(4, functions=functions)]])
    assert loss_values(joined) == [1, 2, 3, 4]
    assert all(step.functions is functions for step in joined)
