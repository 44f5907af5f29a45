"""Several training steps as one program: what starting a program costs is shared by all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tpuspec.spec.results import StepOutput
from tpuspec.tracer.capture import CapturedStep
from tpuspec.tracer.sent_batch import SentBatch
from tpuspec.tracer.sources import Source


class SeveralSteps:
    """A captured training step of which several may run as one program, a loop on the device.

    Args:
      single: one step.
      num_steps: of a program.
    """

    def __init__(self, single: CapturedStep, num_steps: int) -> None:
        self._single, self._num_steps = single, num_steps
        self._is_next_alone = False

    @property
    def kind(self) -> str:
        """How the newest step ran, 'replay' or 'traced'."""
        return self._single.kind

    @property
    def inputs(self) -> list[Source] | None:
        """Where the inputs of one step come from."""
        return self._single.inputs

    @property
    def num_at_once(self) -> int:
        """Steps that `run_several` takes now; 1 where they run one at a time."""
        is_ready = not self._is_next_alone and self._single.may_run_several(self._num_steps)
        return self._num_steps if is_ready else 1

    @property
    def num_replays_ahead(self) -> int:
        """See `spec.backend.RunsSeveral`: none where the next ones may run as one program."""
        return 0

    def __call__(self, batches: Sequence[Any], micro_step: int = 0) -> list[StepOutput]:
        """Dispatches one step; see `spec.backend.CompiledStep`."""
        self._is_next_alone = False
        return self._single(batches, micro_step)

    def run_several(self, batches: Sequence[Sequence[SentBatch]], after_each: Callable[[], None],
                    ) -> list[list[StepOutput]] | None:
        """Dispatches `num_at_once` steps; see `spec.backend.RunsSeveral`."""
        outputs = self._single.run_several(batches, after_each)
        self._is_next_alone = outputs is None
        return outputs

    def publish(self, *, readable: bool = True) -> None:
        """Gives the newest state back to modules and optimizers."""
        self._single.publish(readable=readable)
