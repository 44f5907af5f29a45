"""Base classes of the user's hooks and checkpoint listeners."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class HookContext:
    """What a hook may read and ask for.

    Attributes:
      mode: a ModeKeys value.
      step: completed steps: global step in train, evaluation steps in evaluate, batches in predict.
      model: the module of the first replica, readable at this point; None where the Trainer has none.
    """

    mode: str
    step: int = 0
    model: Any = None
    _stop_requested: bool = field(default=False, repr=False)

    def request_stop(self) -> None:
        """Asks the loop to end at this boundary."""
        self._stop_requested = True

    @property
    def stop_requested(self) -> bool:
        """Whether any hook or listener has asked for the end."""
        return self._stop_requested


class SessionRunHook:
    """Base of all hooks; override what is needed.

    In train, before_run and after_run are called once per loop of `iterations_per_loop` steps; in evaluate once around
    all steps; in predict once per batch; with `use_tpu=False` once per step.
    """

    def begin(self, context: HookContext) -> None:
        """Called once, before the first step; the model holds its initial or restored values."""

    def before_run(self, context: HookContext) -> None:
        """Called before a loop; `context.step` is the step before it."""

    def after_run(self, context: HookContext) -> None:
        """Called after a loop; `context.step` is the last completed step."""

    def end(self, context: HookContext) -> None:
        """Called once at the end, also after an error."""


class CheckpointSaverListener:
    """Base of `saving_listeners`: called around each save of a checkpoint during train()."""

    def begin(self) -> None:
        """Called once, before the first save."""

    def before_save(self, global_step: int) -> None:
        """Called before the checkpoint of `global_step` is written."""

    def after_save(self, global_step: int) -> bool | None:
        """Called after the checkpoint was written; returning True stops training."""

    def end(self, global_step: int) -> None:
        """Called once at the end of training."""
