"""train_and_evaluate: one training, an evaluation behind each of its checkpoints, and exports behind those."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any, Protocol, TypeVar

from tpuspec.checkpoint.store import CheckpointStore
from tpuspec.config import RunConfig
from tpuspec.errors import CheckpointError, ConfigError, ConfigTypeError
from tpuspec.files.location import is_remote
from tpuspec.schedule.exporters import Exports, FinalExporter
from tpuspec.schedule.specs import EvalSpec, TrainSpec
from tpuspec.spec.functions import InputFn
from tpuspec.spec.hooks import CheckpointSaverListener, SessionRunHook
from tpuspec.spec.phase import in_phase
from tpuspec.spec.results import EvalResult

logger = logging.getLogger(__name__)

T = TypeVar("T")

EXPORT_FOLDER = "export"

Results = tuple[EvalResult | None, list[str | None] | None]
"""Of the last evaluation: its metrics, and the folder of each exporter's export, None where it made none."""


class Trains(Exports, Protocol):
    """What train_and_evaluate needs of a Trainer."""

    @property
    def model_dir(self) -> str: ...

    @property
    def config(self) -> RunConfig: ...

    @property
    def is_chief(self) -> bool: ...

    def global_step(self) -> int: ...

    def agree(self, value: T) -> T: ...

    def latest_checkpoint(self) -> str | None: ...

    def train(self, input_fn: InputFn, hooks: Iterable[SessionRunHook] | None = None,
              steps: int | None = None, max_steps: int | None = None,
              saving_listeners: Iterable[CheckpointSaverListener] | None = None) -> Any: ...

    def evaluate(self, input_fn: InputFn, steps: int | None = None,
                 hooks: Iterable[SessionRunHook] | None = None, checkpoint_path: str | os.PathLike[str] | None = None,
                 name: str | None = None) -> EvalResult: ...


def train_and_evaluate(trainer: Trains, train_spec: TrainSpec, eval_spec: EvalSpec) -> Results:
    """Trains, and evaluates every checkpoint but that of the start; exporters see each result.

    In a process with RunConfig(task_type='evaluator') nothing is trained: it evaluates what another process saves in
    model_dir, until that has reached max_steps; with max_steps=None it never ends.

    Args:
      trainer: a Trainer.
      train_spec, eval_spec: what to train and to evaluate.

    Returns:
      Metrics and exports of the last evaluation; (None, None) where training was complete before.

    Raises:
      ConfigTypeError: an argument is something else.
      ConfigError: there are exporters, and model_dir is no folder of this machine, or checkpoints are off; or one is a
        FinalExporter, and max_steps is None.
      Exception: of the Trainer, or of an exporter.
    """
    is_trainer = all(callable(getattr(trainer, verb, None)) for verb in ("train", "evaluate", "export"))
    for name, value, fits, kind in (("eval_spec", eval_spec, isinstance(eval_spec, EvalSpec), "EvalSpec"),
                                    ("trainer", trainer, is_trainer, "Trainer"),
                                    ("train_spec", train_spec, isinstance(train_spec, TrainSpec), "TrainSpec")):
        if not fits:
            raise ConfigTypeError(f"`{name}` must have type tpuspec.{kind}; got {type(value).__name__}.")
    if eval_spec.exporters and is_remote(trainer.model_dir):
        raise ConfigError(f"exporters write to model_dir/{EXPORT_FOLDER}, which must be a folder of this machine; got "
                          f"model_dir={trainer.model_dir!r}. Export with trainer.export(folder, ...) instead.")
    if train_spec.max_steps is None:
        for exporter in eval_spec.exporters:  # type: ignore[union-attr]
            if isinstance(exporter, FinalExporter):
                raise ConfigError(f"the FinalExporter {exporter.name!r} exports at max_steps, and TrainSpec(max_steps="
                                  "None) has none. Give max_steps, or take a LatestExporter.")
    evaluations = Evaluations(trainer, eval_spec, train_spec.max_steps)
    if trainer.config.cluster.task_type == "evaluator":
        evaluate_continuously(evaluations, eval_spec, trainer.latest_checkpoint)
    else:
        trainer.train(train_spec.input_fn, hooks=train_spec.hooks, max_steps=train_spec.max_steps, saving_listeners=[
            *(train_spec.saving_listeners or ()), EvaluateCheckpoints(trainer, evaluations, eval_spec.throttle_secs)])
    return evaluations.results


class EvalStatus(Enum):
    """What became of an evaluation."""

    EVALUATED = "evaluated"
    MISSING_CHECKPOINT = "missing checkpoint"
    NO_NEW_CHECKPOINT = "no new checkpoint"


class Evaluations:
    """Evaluates checkpoints, each once, and calls the exporters.

    Args:
      trainer: of the model.
      eval_spec: what to evaluate, and the exporters.
      max_steps: global step at which training is complete; None where that is not known.

    Attributes:
      results: of the last evaluation; (None, None) before any.
    """

    def __init__(self, trainer: Trains, eval_spec: EvalSpec, max_steps: int | None) -> None:
        self._trainer, self._spec, self._max_steps = trainer, eval_spec, max_steps
        self._evaluated: str | None = None
        self.results: Results = (None, None)

    @property
    def is_complete(self) -> bool:
        """Whether what was evaluated last is the end of training."""
        metrics = self.results[0]
        return metrics is not None and self._max_steps is not None and metrics["global_step"] >= self._max_steps

    def evaluate(self, checkpoint_path: str | None) -> EvalStatus:
        """Evaluates a checkpoint, and exports it where an exporter wants it.

        Args:
          checkpoint_path: its folder; None or '' where there is none yet.

        Raises:
          ConfigError, ConfigTypeError: evaluate() gave no metrics, or none with global_step.
          Exception: of the Trainer, or of an exporter.
        """
        if not checkpoint_path:
            return EvalStatus.MISSING_CHECKPOINT
        if checkpoint_path == self._evaluated:
            return EvalStatus.NO_NEW_CHECKPOINT
        spec = self._spec
        metrics = _checked(self._trainer.evaluate(
            spec.input_fn, steps=spec.steps, name=spec.name, hooks=spec.hooks, checkpoint_path=checkpoint_path))
        self._evaluated, self.results = checkpoint_path, (metrics, [])
        if self._trainer.is_chief or self._trainer.config.cluster.task_type == "evaluator":
            self.results = metrics, self._export(checkpoint_path, metrics)
        return EvalStatus.EVALUATED

    def _export(self, checkpoint_path: str, metrics: EvalResult) -> list[str | None]:
        exports = []
        for exporter in self._spec.exporters:  # type: ignore[union-attr]
            try:
                with in_phase(f"exporter {exporter.name}"):
                    exports.append(exporter.export(
                        trainer=self._trainer, checkpoint_path=checkpoint_path, eval_result=metrics,
                        export_path=os.path.join(self._trainer.model_dir, EXPORT_FOLDER, exporter.name),
                        is_the_final_export=self.is_complete))
            except Exception as error:
                error.add_note(f"The exporter {exporter.name!r} raised it, for {checkpoint_path}.")
                raise
        return exports


def _checked(metrics: Any) -> EvalResult:
    if not isinstance(metrics, dict):
        raise ConfigTypeError(f"evaluate() must return a dict of metrics; got {type(metrics).__name__}.")
    if not metrics:
        raise ConfigError("evaluate() returned no metrics: the evaluation is empty.")
    if "global_step" not in metrics:
        raise ConfigError(f"evaluate() must return 'global_step' among its metrics; got {sorted(metrics)}.")
    return metrics


class EvaluateCheckpoints(CheckpointSaverListener):
    """Evaluates every checkpoint of a training but that of its start, and the last one in any case.

    Args:
      trainer: trains.
      evaluations: evaluates.
      throttle_secs: the least time between two evaluations.
      clock: monotonic seconds.
    """

    def __init__(self, trainer: Trains, evaluations: Evaluations, throttle_secs: float,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._trainer, self._evaluations = trainer, evaluations
        self._throttle_secs, self._clock = throttle_secs, clock
        self._store = CheckpointStore(trainer.model_dir)
        self._first_step = self._last_step = -1
        self._evaluated_at = float("-inf")

    def begin(self) -> None:
        """Notes where training starts."""
        self._first_step = self._last_step = self._trainer.global_step()

    def after_save(self, global_step: int) -> None:
        """Evaluates the checkpoint, unless it is too soon.

        Raises:
          CheckpointError: it is not there.
        """
        is_time = self._trainer.agree(self._clock() >= self._evaluated_at + self._throttle_secs)
        if global_step != self._first_step and is_time:
            self._evaluate(global_step)

    def end(self, global_step: int) -> None:
        """Evaluates the last checkpoint, if that was not done."""
        if global_step != self._last_step:
            self._evaluate(global_step)

    def _evaluate(self, global_step: int) -> None:
        self._evaluated_at, self._last_step = self._clock(), global_step  # also where a signal breaks it off
        path = str(self._store.path(global_step))
        if self._trainer.is_chief and self._trainer.latest_checkpoint() != path:
            raise CheckpointError(f"There was no new checkpoint after the training: {path} is not the newest. Does a "
                                  "listener or another process change model_dir?")
        status = self._evaluations.evaluate(path)
        if status is not EvalStatus.EVALUATED:
            raise CheckpointError(f"There was no new checkpoint after the training ({status.value}).")


def evaluate_continuously(evaluations: Evaluations, eval_spec: EvalSpec, latest_checkpoint: Callable[[], str | None], *,
                          sleep: Callable[[float], None] = time.sleep,
                          clock: Callable[[], float] = time.monotonic) -> None:
    """Evaluates what another process saves, until training is complete.

    Args:
      evaluations: evaluates.
      eval_spec: how long to wait.
      latest_checkpoint: returns the newest checkpoint.
      sleep: waits so many seconds.
      clock: monotonic seconds.
    """
    sleep(eval_spec.start_delay_secs)
    while not evaluations.is_complete:
        begun = clock()
        status = evaluations.evaluate(latest_checkpoint())
        if status is not EvalStatus.EVALUATED:
            logger.info("nothing to evaluate in model_dir: %s.", status.value)
        if not evaluations.is_complete:
            sleep(max(0.0, eval_spec.throttle_secs - (clock() - begun)))
