"""What the worker thread does with each drained step: the user's host functions, metrics, loss, summaries, progress."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tpuspec import summary
from tpuspec.drain.drain import DrainedStep
from tpuspec.drain.executor import host_call_error
from tpuspec.drain.metric_state import MetricState
from tpuspec.errors import NonFiniteLossError, TpuspecError
from tpuspec.spec.host_call import call_host_function
from tpuspec.spec.user_threads import USER_THREADS
from tpuspec.summary.progress import Progress
from tpuspec.summary.writer import SummaryWriter

logger = logging.getLogger(__name__)


def run_host_function(name: str, fn: Callable[..., Any], tensors: Any, *, step: int,
                      global_step: int | None = None) -> Any:
    """Calls a host function of the user's and returns its result.

    Raises:
      HostCallError: it raised; the error names the function and the step.
    """
    try:
        with USER_THREADS.running():
            return call_host_function(name, fn, tensors)
    except Exception as error:
        raise host_call_error(name, step, error, global_step=global_step) from error


class TrainWork:
    """Host work of training steps: loss and throughput to the writer and the progress line, and host_call.

    Args:
      writer: of model_dir.
      progress: the progress line.
      step_kind: tells how the newest step ran, for the line.
      summary_every: steps between summaries; None or 0 for none.
      log_every: steps between throughput measurements; None or 0 for none.
      stop_on_nan: whether a loss that is NaN or infinite is an error.
      clock: seconds.
    """
    def __init__(self, *, writer: SummaryWriter, progress: Progress, step_kind: Callable[[], str],
                 summary_every: int | None, log_every: int | None, stop_on_nan: bool = True,
                 clock: Callable[[], float] = time.perf_counter) -> None:
        self._writer = writer
        self._progress = progress
        self._step_kind = step_kind
        self._summary_every = summary_every
        self._log_every = log_every
        self._stop_on_nan = stop_on_nan
        self._clock = clock
        self._window: tuple[int, float] | None = None
        self._rows = 0
        self._rates: tuple[float | None, float | None] = (None, None)
        self._newest: tuple[int, float] | None = None
        self._logged_step = self._written_step = -1

    def __call__(self, step: DrainedStep) -> None:
        """Does one step's work."""
        loss = step.mean_loss()
        self._report(step, loss)
        if self._stop_on_nan and not math.isfinite(loss):
            raise NonFiniteLossError(
                f"The loss of step {step.step} is {loss}. The newest checkpoint of finite weights is kept. Lower the "
                "learning rate, clip gradients, or look for bad rows; RunConfig(stop_on_nan=False) trains on.")
        host_call = step.functions.host_call
        if host_call is not None and step.parts[0].get("host_call"):  # none between every n-th step
            with summary.as_default(self._writer, step.step):
                run_host_function("host_call", host_call, step.join("host_call"), step=step.step,
                                  global_step=step.step - 1)

    @property
    def newest_loss(self) -> float | None:
        """The loss of the newest step; None before one."""
        return None if self._newest is None else self._newest[1]

    def finish(self) -> None:
        """Reports the last step, as far as it is not reported yet, and brings the writer up to date."""
        if self._newest is not None:
            step, loss = self._newest
            if self._log_every and self._logged_step != step:
                self._log(step, loss)
            if self._summary_every and self._written_step != step:
                self._write_loss(step, loss)

    def _report(self, step: DrainedStep, loss: float) -> None:
        self._newest = (step.step, loss)
        if self._window is None:
            # Rates count from the end of the first step, which compiles.
            self._window = (step.step, self._clock())
        else:
            self._rows += step.rows.num_rows
        if self._log_every and step.step % self._log_every == 0:
            self._log(step.step, loss)
        elif self._log_every and self._progress.is_live:
            self._show(step.step, loss)
        if self._summary_every and step.step % self._summary_every == 0:
            self._write_loss(step.step, loss)

    def _log(self, step: int, loss: float) -> None:
        """Measures the rates since the last time, writes them, and shows them with the loss."""
        self._logged_step = step
        assert self._window is not None, "set by the first step"
        (first_step, first_time), now = self._window, self._clock()
        if step > first_step and now > first_time:
            seconds = now - first_time
            self._rates = ((step - first_step) / seconds, self._rows / seconds)
            self._window, self._rows = (step, now), 0
            if self._summary_every:
                self._writer.scalar("global_step/sec", self._rates[0], step)
                self._writer.scalar("examples/sec", self._rates[1], step)
        self._show(step, loss)

    def _show(self, step: int, loss: float) -> None:
        self._progress.update(step, loss=loss, steps_per_second=self._rates[0], examples_per_second=self._rates[1],
                              step_kind=self._step_kind())

    def _write_loss(self, step: int, loss: float) -> None:
        self._written_step = step
        self._writer.scalar("loss", loss, step)
        self._writer.flush()


class EvalWork:
    """Host work of evaluation steps: metric_fn, the loss, and host_call.

    Args:
      writer: of the evaluation's folder.
      metrics: takes what metric_fn returns.
      progress: the progress line.
      step_kind: tells how the newest step ran, for the line.
      global_step: of the evaluated weights; the default step of summaries.
    """

    def __init__(self, *, writer: SummaryWriter, metrics: MetricState, progress: Progress, step_kind: Callable[[], str],
                 global_step: int) -> None:
        self.loss = LossMean()
        self.num_rows = 0
        self._writer = writer
        self._metrics = metrics
        self._progress = progress
        self._step_kind = step_kind
        self._global_step = global_step

    def __call__(self, step: DrainedStep) -> None:
        """Does one step's work."""
        functions = step.functions
        self.num_rows += step.rows.num_rows
        if "example_losses" in step:
            self.loss.add_examples(step.join("example_losses"))
        elif "loss" in step:
            self.loss.add_batches(step.join("loss"), step.rows.mask)
        if functions.metric_fn is not None and step.rows.num_rows:
            results = run_host_function("metric_fn", functions.metric_fn, step.join("eval_metrics"), step=step.step)
            self._update(results, step)
        elif functions.eval_metric_ops is not None:
            self._update(functions.eval_metric_ops, step)
        if functions.host_call is not None:
            with summary.as_default(self._writer, self._global_step):
                run_host_function("host_call", functions.host_call, step.join("host_call"), step=step.step)
        if self._progress.is_live:
            self._progress.update(step.step, loss=None, steps_per_second=None, examples_per_second=None,
                                  step_kind=self._step_kind())

    def _update(self, results: Any, step: DrainedStep) -> None:
        try:
            self._metrics.update(results, step.rows.num_rows)
        except TpuspecError:
            raise
        except Exception as error:
            raise host_call_error("metric_fn", step.step, error) from error


class LossMean:
    """Mean loss over rows: exact for per-example losses; for scalar losses over the batches without padding."""

    def __init__(self) -> None:
        self._full = [0.0, 0]
        self._padded = [0.0, 0]

    def add_examples(self, losses: Tensor) -> None:
        """Adds losses of real rows, [rows]."""
        self._full[0] += losses.sum(dtype=torch.float64).item()
        self._full[1] += losses.shape[0]

    def add_batches(self, losses: Tensor, mask: Tensor) -> None:
        """Adds each replica's mean loss.

        Args:
          losses: [num_replicas], means over each replica's rows, padding included.
          mask: bool [rows of all replicas], the real rows.
        """
        real = mask.reshape(losses.shape[0], -1)
        counts, full = real.sum(1), real.all(1)
        for which, group in ((full, self._full), (~full & (counts > 0), self._padded)):
            group[0] += (losses.double() * counts)[which].sum().item()
            group[1] += int(counts[which].sum())

    @property
    def num_left_out(self) -> int:
        """Real rows whose loss could not be told apart from that of padding rows, and is not in the mean."""
        return self._padded[1] if self._full[1] else 0

    @property
    def only_padded(self) -> bool:
        """Whether the mean is over padded batches, so that padding rows are in it."""
        return bool(self._padded[1] and not self._full[1])

    def compute(self) -> float:
        """Returns the mean; nan without a row."""
        total, rows = self._full if self._full[1] else self._padded
        return total / rows if rows else torch.nan

    def warn_of_padding(self) -> None:
        """Warns, where a scalar loss could not be made exact."""
        if self.num_left_out:
            logger.warning("the last batch was padded, and its loss is a scalar: %d rows are left out of the mean "
                           "loss. Return a loss per example, [batch], in EVAL to have all of them in it.",
                           self.num_left_out)
        if self.only_padded:
            logger.warning("all batches were padded, and their loss is a scalar: padding rows are in the mean loss. "
                           "Return a loss per example, [batch], in EVAL to leave them out.")
