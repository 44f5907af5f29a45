"""TrainSpec and EvalSpec: what train_and_evaluate trains, evaluates and exports."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tpuspec.errors import ConfigError, ConfigTypeError
from tpuspec.loops.hooks import check_hooks, check_listeners
from tpuspec.schedule.exporters import Exporter, check_exporters
from tpuspec.spec.hooks import CheckpointSaverListener, SessionRunHook


def _check_input_fn(input_fn: object) -> None:
    if not callable(input_fn):
        raise ConfigTypeError(f"`input_fn` must be callable, given: {input_fn!r}.")


@dataclass(frozen=True, slots=True)
class TrainSpec:
    """Training.

    Attributes:
      input_fn: as `Trainer.train` takes it.
      max_steps: global step at which training is complete; None trains to the end of the input.
      hooks: as `Trainer.train` takes them; kept as a tuple.
      saving_listeners: likewise; called before the evaluation of a checkpoint.

    Raises:
      ConfigError, ConfigTypeError: a field breaks its rule.

    Source: tf.estimator.TrainSpec.
    """

    input_fn: Callable[..., Any]
    max_steps: int | None = None
    hooks: Iterable[SessionRunHook] | None = None
    saving_listeners: Iterable[CheckpointSaverListener] | None = None

    def __post_init__(self) -> None:
        _check_input_fn(self.input_fn)
        if self.max_steps is not None and self.max_steps <= 0:
            raise ConfigError(f"Must specify max_steps > 0, given: {self.max_steps}.")
        object.__setattr__(self, "hooks", check_hooks(self.hooks))
        object.__setattr__(self, "saving_listeners", check_listeners(self.saving_listeners))


@dataclass(frozen=True, slots=True)
class EvalSpec:
    """Evaluation and export of checkpoints.

    Attributes:
      input_fn: as `Trainer.evaluate` takes it.
      steps: batches of each evaluation at most; None runs to the end of the input.
      name: of the evaluations.
      hooks: as `Trainer.evaluate` takes them; kept as a tuple.
      exporters: one or several, called behind each evaluation; kept as a tuple.
      start_delay_secs: what a process of its own that evaluates waits for before it looks for a checkpoint.
      throttle_secs: the least time from one evaluation to the next, but for the last.

    Raises:
      ConfigError, ConfigTypeError: a field breaks its rule.

    Source: tf.estimator.EvalSpec.
    """

    input_fn: Callable[..., Any]
    steps: int | None = 100
    name: str | None = None
    hooks: Iterable[SessionRunHook] | None = None
    exporters: Exporter | Iterable[Exporter] | None = None
    start_delay_secs: float = 120
    throttle_secs: float = 600

    def __post_init__(self) -> None:
        _check_input_fn(self.input_fn)
        if self.steps is not None and self.steps <= 0:
            raise ConfigError(f"Must specify steps > 0, given: {self.steps}.")
        if self.name is not None and not isinstance(self.name, str):
            raise ConfigTypeError(f"EvalSpec name must be string, given: {self.name!r}.")
        object.__setattr__(self, "hooks", check_hooks(self.hooks))
        object.__setattr__(self, "exporters", check_exporters(self.exporters))
        if self.start_delay_secs < 0:
            raise ConfigError(f"Must specify start_delay_secs >= 0, given: {self.start_delay_secs}.")
        if self.throttle_secs < 0:
            raise ConfigError(f"Must specify throttle_secs >= 0, given: {self.throttle_secs}.")
