"""Hooks that end training early, by what the evaluations of the run have given."""

from __future__ import annotations

import logging
import math
import numbers
import operator
import os
import time
from collections.abc import Callable
from typing import Any, Protocol

from tpuspec.errors import ConfigError, ConfigTypeError
from tpuspec.schedule.history import History, read_eval_metrics
from tpuspec.spec.counts import check_int, check_positive_int, check_seconds
from tpuspec.spec.hooks import HookContext, SessionRunHook

logger = logging.getLogger(__name__)

IsBetter = Callable[[float, float], bool]


class HasModelDir(Protocol):
    """What a hook needs of a Trainer."""

    @property
    def model_dir(self) -> str: ...


def make_early_stopping_hook(trainer: HasModelDir, should_stop_fn: Callable[[], bool],
                             run_every_secs: float | None = 60, run_every_steps: int | None = None) -> SessionRunHook:
    """Returns a hook that asks a function after loops of training whether to stop; of several hosts one is enough.

    Args:
      trainer: the Trainer that trains.
      should_stop_fn: asked before a training that goes on from a checkpoint, after the first loop, and then in the
        distance below.
      run_every_secs: least seconds between two questions; None where steps count.
      run_every_steps: least steps between them.

    Raises:
      ConfigTypeError: no Trainer, no function, or a number that is none.
      ConfigError: both distances are given, or none, or one is negative.

    Source: tf.estimator.experimental.make_early_stopping_hook.
    """
    _check_trainer(trainer)
    if not callable(should_stop_fn):
        raise ConfigTypeError(f"`should_stop_fn` must be callable; got {type(should_stop_fn).__name__}.")
    if (run_every_secs is None) == (run_every_steps is None):
        raise ConfigError("Only one of `run_every_secs` and `run_every_steps` must be set; got "
                          f"{run_every_secs} and {run_every_steps}. Steps need run_every_secs=None.")
    if run_every_secs is not None:
        check_seconds("run_every_secs", run_every_secs)
    else:
        check_positive_int("run_every_steps", run_every_steps)
    return StopHook(should_stop_fn, run_every_secs, run_every_steps)


class StopHook(SessionRunHook):
    """Asks a function whether to stop; see `make_early_stopping_hook`.

    Args:
      should_stop_fn: the function.
      every_secs, every_steps: the distance between two questions; the other is None.
      clock: monotonic seconds.
    """

    def __init__(self, should_stop_fn: Callable[[], bool], every_secs: float | None, every_steps: int | None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._should_stop, self._every_secs, self._every_steps = should_stop_fn, every_secs, every_steps
        self._clock = clock
        self._asked: tuple[float, int] | None = None

    def begin(self, context: HookContext) -> None:
        """Asks where training goes on from a checkpoint: what ended the run before ends this one, untrained."""
        if context.step:
            self._ask(context)

    def after_run(self, context: HookContext) -> None:
        """Asks, if it is time."""
        now = self._clock()
        if self._asked is not None:
            seconds, steps = now - self._asked[0], context.step - self._asked[1]
            if seconds < self._every_secs if self._every_secs is not None else steps < (self._every_steps or 0):
                return
        self._asked = now, context.step
        self._ask(context)

    def _ask(self, context: HookContext) -> None:
        if self._should_stop():
            logger.info("early stopping asks for the end at step %d.", context.step)
            context.request_stop()


def stop_if_higher_hook(trainer: HasModelDir, metric_name: str, threshold: float, eval_dir: str | None = None,
                        min_steps: int = 0, run_every_secs: float | None = 60,
                        run_every_steps: int | None = None) -> SessionRunHook:
    """Returns a hook that stops once a metric was above a threshold.

    Args:
      trainer: the Trainer that trains.
      metric_name: of an evaluation's results.
      threshold: of the metric.
      eval_dir: folder of the evaluations; None takes model_dir/eval.
      min_steps: evaluations of earlier steps do not count.
      run_every_secs, run_every_steps: see `make_early_stopping_hook`.

    Raises:
      As `make_early_stopping_hook`; the hook a KeyError where an evaluation lacks the metric.
    """
    return _threshold_hook(operator.gt, trainer, metric_name, threshold, eval_dir, min_steps, run_every_secs,
                           run_every_steps)


def stop_if_lower_hook(trainer: HasModelDir, metric_name: str, threshold: float, eval_dir: str | None = None,
                       min_steps: int = 0, run_every_secs: float | None = 60,
                       run_every_steps: int | None = None) -> SessionRunHook:
    """Returns a hook that stops once a metric was below a threshold; see `stop_if_higher_hook`."""
    return _threshold_hook(operator.lt, trainer, metric_name, threshold, eval_dir, min_steps, run_every_secs,
                           run_every_steps)


def stop_if_no_increase_hook(trainer: HasModelDir, metric_name: str, max_steps_without_increase: int,
                             eval_dir: str | None = None, min_steps: int = 0, run_every_secs: float | None = 60,
                             run_every_steps: int | None = None) -> SessionRunHook:
    """Returns a hook that stops once a metric has not risen for so many steps; see `stop_if_higher_hook`."""
    return _improvement_hook(operator.gt, trainer, metric_name, max_steps_without_increase, eval_dir, min_steps,
                             run_every_secs, run_every_steps)


def stop_if_no_decrease_hook(trainer: HasModelDir, metric_name: str, max_steps_without_decrease: int,
                             eval_dir: str | None = None, min_steps: int = 0, run_every_secs: float | None = 60,
                             run_every_steps: int | None = None) -> SessionRunHook:
    """Returns a hook that stops once a metric has not fallen for so many steps; see `stop_if_higher_hook`."""
    return _improvement_hook(operator.lt, trainer, metric_name, max_steps_without_decrease, eval_dir, min_steps,
                             run_every_secs, run_every_steps)


def has_crossed(history: History, metric_name: str, threshold: float, min_steps: int, is_better: IsBetter) -> bool:
    """Whether any evaluation from `min_steps` on was strictly better than a threshold."""
    return any(is_better(metrics[metric_name], threshold) for step, metrics in history.items() if step >= min_steps)


def has_stalled(history: History, metric_name: str, max_steps: int, min_steps: int, is_better: IsBetter) -> bool:
    """Whether any evaluation from `min_steps` on was no better than one that was made `max_steps` or more before it.

    A number is better than NaN.
    """
    best: tuple[int, float] | None = None
    for step, metrics in history.items():
        if step < min_steps:
            continue
        value = metrics[metric_name]
        if best is None or is_better(value, best[1]) or (math.isnan(best[1]) and not math.isnan(value)):
            best = step, value
        elif step - best[0] >= max_steps:
            return True
    return False


def _threshold_hook(is_better: IsBetter, trainer: HasModelDir, metric_name: str, threshold: float,
                    eval_dir: str | None, min_steps: int, *distance: Any) -> SessionRunHook:
    folder = _eval_dir(trainer, eval_dir)
    check_int("min_steps", min_steps)
    if not isinstance(threshold, numbers.Real) or math.isnan(threshold):
        raise ConfigTypeError(f"threshold must be a number; got {threshold!r}.")
    return make_early_stopping_hook(trainer, lambda: has_crossed(
        read_eval_metrics(folder), metric_name, threshold, min_steps, is_better), *distance)


def _improvement_hook(is_better: IsBetter, trainer: HasModelDir, metric_name: str, max_steps: int,
                      eval_dir: str | None, min_steps: int, *distance: Any) -> SessionRunHook:
    folder = _eval_dir(trainer, eval_dir)
    check_int("min_steps", min_steps)
    check_int("the steps without improvement", max_steps)
    return make_early_stopping_hook(trainer, lambda: has_stalled(
        read_eval_metrics(folder), metric_name, max_steps, min_steps, is_better), *distance)


def _eval_dir(trainer: HasModelDir, eval_dir: str | None) -> str:
    _check_trainer(trainer)
    folder = eval_dir or os.path.join(trainer.model_dir, "eval")
    read_eval_metrics(folder)  # an address is refused now, not within training
    return folder


def _check_trainer(trainer: object) -> None:
    if not callable(getattr(trainer, "train", None)) or not isinstance(getattr(trainer, "model_dir", None), str):
        raise ConfigTypeError(f"`trainer` must have type tpuspec.Trainer; got {type(trainer).__name__}.")
