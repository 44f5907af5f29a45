"""Base classes of the user's hooks and checkpoint listeners."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class HookContext:
    """What a hook may read and ask for.

    Attributes:
      mode: a ModeKeys value.
      step: completed steps: global step in train, evaluation steps in evaluate, batches in predict.
      model: the module of the first replica, readable at this point; None where the Trainer has none.
      optimizer: in train what the Trainer's optimizer function returned: an optimizer, or a dict of several. A hook
        that sets a learning rate sets it in `param_groups`. None elsewhere.
      read_loss, read_metrics: read what `loss` and `metrics` are.
    """

    mode: str
    step: int = 0
    model: Any = None
    optimizer: Any = None
    read_loss: Callable[[], float | None] = field(default=lambda: None, repr=False)
    read_metrics: Callable[[], Mapping[str, Any] | None] = field(default=lambda: None, repr=False)
    _stop_requested: bool = field(default=False, repr=False)

    @property
    def loss(self) -> float | None:
        """In train the mean loss of step `step` over all replicas; reading it waits for the host work until then.

        None before the first step of a call, in other modes, and on hosts other than the chief.

        Raises:
          HostCallError: host work of a step raised.
        """
        return self.read_loss()

    @property
    def metrics(self) -> Mapping[str, Any] | None:
        """In train the results of this Trainer's newest evaluation; in evaluate its own, from `end` on; else None."""
        return self.read_metrics()

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
