"""Several training steps in one program: what starting a program costs is shared by all of them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from tpuspec.runtime import graph
from tpuspec.runtime.capture import CapturedStep
from tpuspec.runtime.learning_rates import LearningRates
from tpuspec.runtime.sent_batch import BatchesOfSteps, form_of
from tpuspec.runtime.slots import read_slots
from tpuspec.spec.backend import Replica, StepFunction
from tpuspec.spec.results import Batch, StepOutput

logger = logging.getLogger(__name__)


class RatesOfSteps(LearningRates):
    """The learning rates of several steps, as they were noted one step after the other."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        super().__init__(replicas)
        self._noted: list[list[float]] = []
        self._others: list[list[Any]] = []
        self._tensors: Sequence[Tensor] = ()

    def note(self, num_steps: int, after_each: Callable[[], None]) -> bool:
        """Notes the learning rates of the next steps; returns whether the schedules move nothing else meanwhile."""
        self._noted, self._others = [], [super().others()]
        for _ in range(num_steps):
            self._noted.append(super().read())
            after_each()
            self._others.append(super().others())
        return all(others == self._others[0] for others in self._others)

    def others(self) -> list[Any]:
        """Returns the other hyper-parameters of all steps."""
        return self._others[0]

    def read(self) -> list[float]:
        """Returns the learning rates of all steps, one a step and group."""
        return [rate for rates in self._noted for rate in rates]

    @contextlib.contextmanager
    def in_place(self, replica: Replica, sent: Sequence[Tensor]) -> Iterator[None]:
        """Takes the tensors that `of_step` puts into the optimizers' groups."""
        self._tensors = sent
        yield

    def of_step(self, number: int, replica: Replica) -> contextlib.AbstractContextManager[None]:
        """Puts one step's tensors into the optimizers' groups within a block."""
        size = len(self._noted[number])
        return super().in_place(replica, self._tensors[number * size:(number + 1) * size])


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsInOne:
    """Several steps as one: each has its own batch, learning rates and seed, and none is compiled into the next.

    Without that the last bits would depend on how many steps a program has.

    Attributes:
      step: one step of one replica.
      rates: of all steps.
    """

    step: StepFunction
    rates: RatesOfSteps

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
            with self.rates.of_step(number, replica):
                outputs.append(self.step(replica, part, micro_step))
        return replace(outputs[-1], tensors={
            f"{number} {group}": tensors for number, output in enumerate(outputs)
            for group, tensors in output.tensors.items()})


class SeveralSteps:
    """A training step of which several may run as one program, once a single one was captured.

    Args:
      single: one step.
      together: a `StepsInOne`.
      rates: of `together`.
      num_steps: steps of `together`.
    """

    def __init__(self, single: CapturedStep, together: CapturedStep, rates: RatesOfSteps, num_steps: int) -> None:
        self._single, self._together, self._rates, self._num_steps = single, together, rates, num_steps
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
        if not self._rates.note(len(batches), after_each):
            logger.warning("steps_per_execution=%d has no effect from here on: the schedule moves more than learning "
                           "rates, as OneCycleLR does unless cycle_momentum=False.", self._num_steps)
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
