"""A plan of one mode: its step is traced as in a run, until it would be replayed, and its program compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from tpuspec.errors import CaptureError, ConfigError
from tpuspec.loops.prepare import Prepared
from tpuspec.loops.session import Session
from tpuspec.spec.backend import RunsSeveral
from tpuspec.spec.engine import CompiledFacts

_MOST_STEPS = 40
"""Two equal traces are needed, and optimizers make their state in the first; the checks that follow come at longer and
longer distances, into which several steps at once must fit."""


class PlansPrograms(Protocol):
    """What a backend for chips that are not there knows besides."""

    def inputs_of_newest(self) -> list[tuple[str, str]]:
        """Returns (kind, name) of each input of the program that was replayed last."""
        ...


def plan_mode(session: Session, prepared: Prepared, compile_newest: Callable[[], CompiledFacts], num_at_once: int,
              ) -> tuple[CompiledFacts, list[tuple[str, str]], int]:
    """Traces a step on the first batch until it would be replayed, and compiles its program.

    Args:
      session: over a backend that compiles for a topology.
      prepared: the mode's step and input.
      compile_newest: compiles the program that was replayed last.
      num_at_once: steps of one program.

    Returns:
      What the compiler says, (kind, name) of each input, and the steps of the program.

    Raises:
      ConfigError: the step cannot be captured.
    """
    backend: Any = session.backend
    step = prepared.step
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
        num_steps = 1
        if isinstance(step, RunsSeveral) and step.num_at_once > 1:
            several = step.feed_several([batch.replicas] * step.num_at_once)
            if step.run_several(several, lambda: None) is not None:
                num_steps = len(several)
    except CaptureError as error:
        raise ConfigError(f"mode=plan needs a step that can be captured: {error}") from error
    return compile_newest(), backend.inputs_of_newest(), num_steps
