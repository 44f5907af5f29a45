"""Several training steps in one program: what starting a program costs is shared by all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tpuspec.runtime import graph
from tpuspec.runtime.capture import CapturedStep
from tpuspec.runtime.optimizer_numbers import NumbersOfSteps
from tpuspec.runtime.sent_batch import BatchesOfSteps, form_of
from tpuspec.runtime.slots import read_slots
from tpuspec.spec.backend import Replica, StepFunction
from tpuspec.spec.results import Batch, StepOutput

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsInOne:
    """Several steps as one: each has its own batch, learning rates and seed, and none is compiled into the next.

    Without that the last bits would depend on how many steps a program has.

    Attributes:
      step: one step of one replica.
      numbers: of the optimizers in all steps.
    """

    step: StepFunction
    numbers: NumbersOfSteps

    def __call__(self, replica: Replica, batch: Any, micro_step: int) -> StepOutput:
        """Runs the steps on `BatchesOfSteps`; the tensors of step i are in the groups 'i GROUP'."""
        device = str(replica.device)
        seed = graph.get_seed(device)
        outputs: list[StepOutput] = []
        for number, part in enumerate(batch.parts):
            if number:
                seed = graph.next_seed(seed)
                graph.set_seed(seed, device)
                graph.separate(graph.waiting(list(read_slots(replica).values())))
            with self.numbers.of_step(number, replica):
                outputs.append(self.step(replica, part, micro_step))
        return replace(outputs[-1], tensors={
            f"{number} {group}": tensors for number, output in enumerate(outputs)
            for group, tensors in output.tensors.items()})


class SeveralSteps:
    """A training step of which several may run as one program, once a single one was captured.

    Args:
      single: one step.
      together: a `StepsInOne`.
      numbers: of `together`.
      num_steps: steps of `together`.
    """

    def __init__(self, single: CapturedStep, together: CapturedStep, numbers: NumbersOfSteps, num_steps: int,
                 ) -> None:
        self._single, self._together, self._numbers, self._num_steps = single, together, numbers, num_steps
        self._newest = single

    @property
    def kind(self) -> str:
        """How the newest step ran, 'replay' or 'traced'."""
        return self._newest.kind

    @property
    def num_at_once(self) -> int:
        """Steps that `run_several` takes now; 1 where they run one at a time."""
        is_ready = self._single.kind == "replay" and not self._together.has_given_up
        return self._num_steps if is_ready else 1

    def __call__(self, batches: Sequence[Batch], micro_step: int = 0) -> list[StepOutput]:
        """Dispatches one step; see `spec.backend.CompiledStep`."""
        self._together.publish()
        self._newest = self._single
        return self._single(batches, micro_step)

    def run_several(self, batches: Sequence[Sequence[Batch]], after_each: Callable[[], None],
                    ) -> list[list[StepOutput]] | None:
        """Dispatches `num_at_once` steps; see `spec.backend.RunsSeveral`."""
        self._single.publish()
        if not self._numbers.note(len(batches), after_each):
            logger.warning("steps_per_execution=%d has no effect from here on: the schedule moves "
                           "hyper-parameters that are no numbers.", self._num_steps)
            self._num_steps = 1
            return None
        self._newest = self._together
        form = tuple(form_of(parts[0]) for parts in batches)
        outputs = self._together([
            BatchesOfSteps(parts, form) for parts in zip(*batches, strict=True)])  # type: ignore[misc]
        return [list(of_step) for of_step in zip(*(_split(output, len(batches)) for output in outputs), strict=True)]

    def publish(self) -> None:
        """Makes the newest state readable in the modules and optimizers."""
        self._single.publish()
        self._together.publish()


def _split(output: StepOutput, num_steps: int) -> list[StepOutput]:
    groups: list[dict[str, Any]] = [{} for _ in range(num_steps)]
    for key, tensors in output.tensors.items():
        number, _, group = key.partition(" ")
        groups[int(number)][group] = tensors
    return [StepOutput(tensors=of_step, functions=output.functions, num_stacked=output.num_stacked)
            for of_step in groups]
