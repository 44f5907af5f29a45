from __future__ import annotations

from typing import Any

import pytest
import torch

from tpuspec.errors import HostCallError
from tpuspec.host.drain import Drain, DrainedStep, join_micro_steps
from tpuspec.host.executor import HostExecutor
from tpuspec.spec.results import HostFunctions, StepOutput, StepRows
from tpuspec.testing import FakeBackend


def output(value: float, *, is_update: bool = True, functions: HostFunctions | None = None) -> StepOutput:
    return StepOutput(tensors={"loss": torch.tensor(value), "host_call": [torch.tensor([value])]}, is_update=is_update,
                      functions=functions or HostFunctions())


def rows(num_rows: int = 2) -> StepRows:
    return StepRows(mask=torch.ones(num_rows, dtype=torch.bool), num_rows=num_rows)


class Recorder:
    """Runs steps through a drain, and notes what is dispatched, fetched and worked on."""

    def __init__(self, **options: Any) -> None:
        self.events: list[str] = []
        self.steps: list[DrainedStep] = []
        self.executor = HostExecutor()
        self.drain = Drain(self._fetch, self.executor, work=self.steps.append, **options)

    def _fetch(self, tree: list[dict[str, Any]]) -> Any:
        self.events.append(f"fetch {tree[0]['loss'].item():g}")
        return tree

    def run(self, *steps: int) -> None:
        for step in steps:
            self.events.append(f"dispatch {step}")
            self.drain.submit(step, [output(step)], rows())


def test_a_step_is_fetched_only_after_the_next_one_was_dispatched():
    recorder = Recorder()
    recorder.run(1, 2, 3)
    assert recorder.events == ["dispatch 1", "dispatch 2", "fetch 1", "dispatch 3", "fetch 2"]
    recorder.drain.flush()
    recorder.executor.close()
    assert recorder.events[-1] == "fetch 3"
    assert [step.step for step in recorder.steps] == [1, 2, 3]


def test_flush_brings_the_last_step_once():
    recorder = Recorder()
    recorder.run(1)
    assert recorder.events == ["dispatch 1"]
    flushed = recorder.drain.flush()
    assert flushed is not None
    assert flushed.step == 1
    assert recorder.drain.flush() is None
    recorder.executor.close()


def test_without_work_the_caller_gets_each_step_one_late():
    with HostExecutor() as executor:
        drain = Drain(FakeBackend().fetch, executor)
        drained = [drain.submit(step, [output(step), output(10 * step)], rows()) for step in (1, 2)]
        drained.append(drain.flush())
    assert drained[0] is None
    assert [(step.step, step.tensors["loss"].tolist()) for step in drained[1:]] == [(1, [1, 10]), (2, [2, 20])]


def test_all_replicas_of_a_step_come_in_one_fetch():
    backend = FakeBackend(num_replicas=3)
    with HostExecutor() as executor:
        drain = Drain(backend.fetch, executor)
        drain.submit(1, [output(i) for i in range(3)], rows(3))
        assert backend.events == []
        drain.flush()
    assert backend.events == ["fetch"]
    assert len(backend.fetched[0]) == 3


def test_the_worker_gets_the_functions_and_rows_of_that_very_step():
    recorder = Recorder()
    functions = [HostFunctions(host_call=print), HostFunctions(host_call=repr)]
    for step, (made, real) in enumerate(zip(functions, [rows(3), rows(1)], strict=True), start=1):
        recorder.drain.submit(step, [output(step, functions=made)], real)
    recorder.drain.flush()
    recorder.executor.close()
    assert [step.functions.host_call for step in recorder.steps] == [print, repr]
    assert [step.rows.num_rows for step in recorder.steps] == [3, 1]


def test_of_copies_the_first_one_is_taken():
    recorder = Recorder(copies=2)
    recorder.drain.submit(1, [output(1), output(2)], rows())
    drained = recorder.drain.flush()
    recorder.executor.close()
    assert drained is not None
    assert drained.tensors["loss"].tolist() == [1]


def test_of_copies_all_micro_batches_of_the_first_one_are_taken():
    recorder = Recorder(copies=2)
    recorder.drain.submit(1, join_micro_steps([[output(1), output(2)], [output(3), output(4)]]), rows())
    drained = recorder.drain.flush()
    recorder.executor.close()
    assert drained is not None
    assert drained.tensors["loss"].tolist() == [1, 3]


def test_an_error_of_the_work_is_raised_by_a_later_submit_or_flush_and_names_the_step():
    def work(step: DrainedStep) -> None:
        raise ValueError(f"in {step.step}")

    executor = HostExecutor()
    drain = Drain(FakeBackend().fetch, executor, work=work)
    with pytest.raises(HostCallError, match="step 1 raised ValueError: in 1"):
        for step in range(1, 1000):
            drain.submit(step, [output(step)], rows())
    executor.close()


def test_an_error_of_the_fetch_is_raised_as_it_is():
    def fetch(tree: Any) -> Any:
        raise OSError("the device is gone")

    with HostExecutor() as executor:
        drain = Drain(fetch, executor)
        drain.submit(1, [output(1)], rows())
        with pytest.raises(OSError, match="the device is gone"):
            drain.submit(2, [output(2)], rows())


def losses(outputs: list[StepOutput]) -> list[float]:
    return [output.tensors["loss"].item() for output in outputs]


def test_one_micro_step_is_the_step():
    assert losses(join_micro_steps([[output(1), output(2)]])) == [1, 2]


def test_micro_steps_are_ordered_by_replica_then_batch_and_keep_the_updates_functions():
    functions = HostFunctions(host_call=print)
    joined = join_micro_steps([[output(1, is_update=False), output(3, is_update=False)],
                               [output(2, functions=functions), output(4, functions=functions)]])
    assert losses(joined) == [1, 2, 3, 4]
    assert all(step.functions is functions for step in joined)
