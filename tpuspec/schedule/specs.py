"""TrainSpec and EvalSpec: what train_and_evaluate trains, evaluates and exports."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tpuspec.errors import ConfigTypeError
from tpuspec.loops.hooks import check_hooks, check_listeners
from tpuspec.schedule.exporters import Exporter, check_exporters
from tpuspec.spec.counts import check_above_zero, check_int, check_seconds
from tpuspec.spec.functions import InputFn, check_input_fn
from tpuspec.spec.hooks import CheckpointSaverListener, SessionRunHook
from tpuspec.spec.names import check_name


def _check_input_fn(input_fn: Any) -> None:
    if not callable(input_fn):
        raise ConfigTypeError(f"`input_fn` must be callable, given: {input_fn!r}.")
    check_input_fn(input_fn)


def _check_steps(name: str, steps: Any) -> None:
    if steps is not None:
        check_above_zero(name, steps)
        check_int(name, steps)


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

    input_fn: InputFn
    max_steps: int | None = None
    hooks: Iterable[SessionRunHook] | None = None
    saving_listeners: Iterable[CheckpointSaverListener] | None = None

    def __post_init__(self) -> None:
        _check_input_fn(self.input_fn)
        _check_steps("max_steps", self.max_steps)
        object.__setattr__(self, "hooks", check_hooks(self.hooks))
        object.__setattr__(self, "saving_listeners", check_listeners(self.saving_listeners))


@dataclass(frozen=True, slots=True)
class EvalSpec:
    """Evaluation and export of checkpoints.

    Attributes:
      input_fn: as `Trainer.evaluate` takes it.
      steps: batches of each evaluation at most; None, where TPUEstimator has 100, runs to the end of the input.
      name: of the evaluations.
      hooks: as `Trainer.evaluate` takes them; kept as a tuple.
      exporters: one or several, called behind each evaluation; kept as a tuple.
      start_delay_secs: what a process of its own that evaluates waits for before it looks for a checkpoint.
      throttle_secs: the least time from one evaluation to the next, but for the last.

    Raises:
      ConfigError, ConfigTypeError: a field breaks its rule.

    Source: tf.estimator.EvalSpec.
    """

    input_fn: InputFn
    steps: int | None = None
    name: str | None = None
    hooks: Iterable[SessionRunHook] | None = None
    exporters: Exporter | Iterable[Exporter] | None = None
    start_delay_secs: float = 120
    throttle_secs: float = 600

    def __post_init__(self) -> None:
        _check_input_fn(self.input_fn)
        _check_steps("steps", self.steps)
        if self.name is not None and not isinstance(self.name, str):
            raise ConfigTypeError(f"EvalSpec name must be string, given: {self.name!r}.")
        if self.name:
            check_name(self.name, "EvalSpec name")
        object.__setattr__(self, "hooks", check_hooks(self.hooks))
        object.__setattr__(self, "exporters", check_exporters(self.exporters))
        check_seconds("start_delay_secs", self.start_delay_secs)
        check_seconds("throttle_secs", self.throttle_secs)
