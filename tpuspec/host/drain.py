"""Brings each step's outputs to the host one step late, so that the device always has the next step to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tpuspec.host.assemble import assemble
from tpuspec.host.executor import HostExecutor
from tpuspec.spec.results import HostFunctions, StepOutput, StepRows


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainedStep:
    """One step's outputs on the host.

    Attributes:
      step: the step, counted from 1.
      tensors: group -> tensors over all replicas, padding dropped, as `assemble` returns them.
      functions: the host functions for them.
      rows: real rows and padding of the step's batch.
    """

    step: int
    tensors: dict[str, Any]
    functions: HostFunctions
    rows: StepRows


@dataclass(frozen=True, slots=True)
class _Dispatched:
    step: int
    outputs: Sequence[StepOutput]
    rows: StepRows


class Drain:
    """Fetches step N after step N+1 was dispatched, and hands it to the worker.

    Args:
      fetch: copies a structure's device tensors to the host in one transfer; `Backend.fetch`.
      executor: runs `work`; its bounded queue holds back a loop whose host functions are too slow.
      work: what to do with a step, on the worker thread; None leaves steps to the caller of `submit` and `flush`.
      copies: replicas that compute the same rows, in BROADCAST all of them; the first one's outputs are taken.
    """

    def __init__(self, fetch: Callable[[Any], Any], executor: HostExecutor, *,
                 work: Callable[[DrainedStep], None] | None = None, copies: int = 1) -> None:
        self._fetch = fetch
        self._executor = executor
        self._work = work
        self._copies = copies
        self._dispatched: _Dispatched | None = None

    def submit(self, step: int, outputs: Sequence[StepOutput], rows: StepRows) -> DrainedStep | None:
        """Takes a dispatched step's outputs and brings in the step before; returns that one, if there is one.

        Raises:
          HostCallError: work on an earlier step raised.
        """
        previous, self._dispatched = self._dispatched, _Dispatched(step, outputs, rows)
        return None if previous is None else self._bring(previous)

    def flush(self) -> DrainedStep | None:
        """Brings in the last dispatched step and returns it, if there is one.

        Raises:
          HostCallError: work on an earlier step raised.
        """
        previous, self._dispatched = self._dispatched, None
        return None if previous is None else self._bring(previous)

    def _bring(self, dispatched: _Dispatched) -> DrainedStep:
        outputs = dispatched.outputs[:len(dispatched.outputs) // self._copies]
        fetched = self._fetch([dict(output.tensors) for output in outputs])
        step = DrainedStep(
            step=dispatched.step, tensors=assemble(fetched, dispatched.rows),
            functions=outputs[0].functions, rows=dispatched.rows)
        if self._work is not None:
            work = self._work
            self._executor.submit(step.step, lambda: work(step))
        return step


def join_micro_steps(micro_steps: Sequence[Sequence[StepOutput]]) -> list[StepOutput]:
    """Orders the outputs of an update's micro-batches as if more replicas had computed them: by replica, then batch."""
    if len(micro_steps) == 1:
        return list(micro_steps[0])
    return [replace(outputs[r], functions=micro_steps[-1][0].functions)
            for r in range(len(micro_steps[0])) for outputs in micro_steps]
