"""Brings each step's outputs to the host on the worker thread, so that the loop only dispatches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.utils import _pytree as pytree

from tpuspec.drain.assemble import join_rows
from tpuspec.drain.executor import HostExecutor
from tpuspec.errors import DeviceError, TpuspecError
from tpuspec.spec.results import HostFunctions, StepOutput, StepRows, flat_tensors, rebuild


@dataclass(slots=True)
class DrainedStep:
    """One step's outputs on the host.

    Attributes:
      step: the step, counted from 1.
      parts: for each replica, group -> its tensors.
      functions: the host functions for them.
      rows: real rows and padding of the step's batch.
    """

    step: int
    parts: Sequence[Mapping[str, Any]]
    functions: HostFunctions
    rows: StepRows

    def __contains__(self, group: str) -> bool:
        return group in self.parts[0]

    def join(self, group: str) -> Any:
        """Returns a group's tensors over all replicas, padding dropped; see `join_rows`."""
        return join_rows([part[group] for part in self.parts], self.rows)

    def mean_loss(self) -> float:
        """Returns the mean of the replicas' scalar losses."""
        if len(self.parts) == 1:
            return self.parts[0]["loss"].item()
        return sum(part["loss"].item() for part in self.parts) / len(self.parts)


class _Dispatched:
    """A step under way: its number, outputs, rows and wanted groups."""

    __slots__ = ("outputs", "rows", "step", "without")

    def __init__(self, step: int, outputs: Sequence[StepOutput], rows: StepRows, without: str | None) -> None:
        self.step, self.outputs, self.rows, self.without = step, outputs, rows, without

    def wanted(self) -> list[Mapping[str, Any]]:
        """Returns each output's groups that the host needs."""
        if self.without is None:
            return [output.tensors for output in self.outputs]
        return [{group: tensors for group, tensors in output.tensors.items() if group != self.without}
                for output in self.outputs]


class Drain:
    """Hands each dispatched step to the worker, which fetches its outputs and works on them, in order.

    The worker fetches several steps that wait in one transfer, so that it catches up with a loop that is faster; not
    all, so that the device has the others to go on with meanwhile.

    Args:
      fetch: copies a list of device tensors to the host; `Backend.fetch`. Called on the worker.
      executor: the worker; its bounded queue holds back a loop whose host functions are too slow.
      work: what to do with a step, on the worker.
      copies: replicas that compute the same rows, in BROADCAST all of them; the first one's outputs are taken.
      host_call_every: the 'host_call' tensors of the steps between are left on the device.
    """

    def __init__(self, fetch: Callable[[Any], Any], executor: HostExecutor, *, work: Callable[[DrainedStep], None],
                 copies: int = 1, host_call_every: int = 1) -> None:
        self._fetch = fetch
        self._executor = executor
        self._work = work
        self._copies = copies
        self._host_call_every = host_call_every
        self._dispatched: deque[_Dispatched] = deque()
        self._fetched: deque[DrainedStep] = deque()

    def submit(self, step: int, outputs: Sequence[StepOutput], rows: StepRows) -> None:
        """Takes the outputs of a step that was dispatched; waits only while the queue is full.

        Raises:
          HostCallError: work on an earlier step raised.
          DeviceError: an earlier step's outputs could not be fetched.
        """
        if self._copies > 1 and not outputs[0].num_stacked:
            outputs = outputs[:len(outputs) // self._copies]
        # Counted in global steps, from the value before the update: 0, n, 2n, ...
        without = "host_call" if (step - 1) % self._host_call_every else None
        self._dispatched.append(_Dispatched(step, outputs, rows, without))
        self._executor.submit(step, self._work_on_next)

    def flush(self, seconds: float | None = None) -> bool:
        """Waits until every step that was submitted is worked on, or so many seconds; returns whether all are.

        Raises:
          HostCallError, DeviceError: as `submit`.
        """
        is_done = self._executor.wait(seconds=seconds)
        self._executor.check()
        return is_done

    def _work_on_next(self) -> None:
        if not self._fetched:
            self._fetch_waiting()
        self._work(self._fetched.popleft())

    def _fetch_waiting(self) -> None:
        num_steps = min(len(self._dispatched), self._executor.enough)
        dispatched = [self._dispatched.popleft() for _ in range(num_steps)]
        wanted = [step.wanted() for step in dispatched]
        tensors = [tensor for parts in wanted for part in parts for tensor in flat_tensors(part)]
        try:
            with self._executor.waiting_for_device():
                fetched = iter(self._fetch(tensors))
        except TpuspecError:
            raise
        except Exception as error:
            first, last = dispatched[0].step, dispatched[-1].step
            steps = f"step {first}" if first == last else f"steps {first} to {last}"
            raise DeviceError(f"the outputs of {steps} could not be brought from the device: "
                              f"{type(error).__name__}: {error}") from error
        self._fetched.extend(DrainedStep(
            step.step, self._parts(step, [rebuild(part, fetched) for part in parts]), step.outputs[0].functions,
            step.rows) for step, parts in zip(dispatched, wanted, strict=True))

    def _parts(self, step: _Dispatched, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns each replica's tensors, where they came stacked: by replica, then micro-batch, without copies."""
        num_stacked = step.outputs[0].num_stacked
        if not num_stacked:
            return parts
        return [pytree.tree_map(lambda tensor, i=i: tensor[i], part)
                for i in range(num_stacked // self._copies) for part in parts]


def join_micro_steps(micro_steps: Sequence[Sequence[StepOutput]]) -> list[StepOutput]:
    """Orders the outputs of an update's micro-batches as if more replicas had computed them: by replica, then batch."""
    if len(micro_steps) == 1:
        return list(micro_steps[0])
    return [replace(outputs[r], functions=micro_steps[-1][0].functions)
            for r in range(len(micro_steps[0])) for outputs in micro_steps]
