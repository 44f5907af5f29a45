"""A plan of one mode: its step is traced as in a run, until it would be replayed, and its program compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from tpuspec.errors import CaptureError, ConfigError
from tpuspec.loops.prepare import Preparation, Prepared
from tpuspec.loops.session import Session
from tpuspec.plan.chips import chip_of
from tpuspec.plan.plan import ModePlan
from tpuspec.spec.backend import RunsSeveral
from tpuspec.spec.engine import CompiledFacts
from tpuspec.spec.mode import ModeKeys

_MOST_STEPS = 40
"""Two equal traces are needed, and optimizers make their state in the first; the checks that follow come at longer and
longer distances, into which several steps at once must fit."""


class Chips(Protocol):
    """A topology of chips that are not there.

    Attributes:
      num_chips: of it.
    """

    num_chips: int

    def num_devices(self) -> int:
        """Counts the devices: a chip of some generations is two."""
        ...

    def compile_newest(self) -> CompiledFacts:
        """Compiles the program that was replayed last."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Planning:
    """Plans the modes of a run, one after the other.

    Attributes:
      session: over a backend that compiles for the topology.
      chips: the topology.
      topology: its name.
      num_at_once: training steps of one program.
      seed: of evaluations.
    """

    session: Session
    chips: Chips
    topology: str
    num_at_once: int
    seed: int

    def run(self, mode: ModeKeys, preparation: Preparation, input_fn: Callable[..., Any], num_rows: int) -> ModePlan:
        """Plans a mode.

        Args:
          mode: train, eval or predict.
          preparation: of it.
          input_fn: makes the input; one batch is drawn.
          num_rows: of the global batch.

        Raises:
          ConfigError: the step cannot be captured.
        """
        is_training = mode is ModeKeys.TRAIN
        with contextlib.ExitStack() as stack:
            if is_training:
                self.session.ensure_optimizers()
                self.session.set_training(True)
            else:
                stack.enter_context(self.session.evaluating(self.seed))
            prepared = preparation.run(input_fn)
            stack.enter_context(contextlib.closing(prepared.batches))
            num_steps = self._replay(prepared, self.num_at_once if is_training else 1)
            backend: Any = self.session.backend
            return ModePlan.of(
                "predict" if mode is ModeKeys.PREDICT else mode.value, self.chips.compile_newest(),
                backend.inputs_of_newest(), chip_of(self.topology), self.chips.num_devices() // self.chips.num_chips,
                num_rows, num_steps)

    def _replay(self, prepared: Prepared, num_at_once: int) -> int:
        """Takes steps on the first batch until one is a replay; returns the number of steps of its program."""
        backend, step = self.session.backend, prepared.step
        batch = next(iter(prepared.batches))
        try:
            for _ in range(_MOST_STEPS):
                is_update, micro_step = False, 0
                while not is_update:
                    is_update = step(backend.feed(batch.replicas), micro_step)[0].is_update
                    micro_step += 1
                if backend.step_kind == "replay" and (
                        num_at_once == 1 or not isinstance(step, RunsSeveral) or step.num_at_once > 1):
                    break
            if backend.step_kind != "replay":
                raise ConfigError("mode=plan needs a step that is captured, and this one is another one each time.")
            if isinstance(step, RunsSeveral) and step.num_at_once > 1:
                several = step.feed_several([batch.replicas] * step.num_at_once)
                if step.run_several(several, lambda: None) is not None:
                    return len(several)
        except CaptureError as error:
            raise ConfigError(f"mode=plan needs a step that can be captured: {error}") from error
        return 1
