"""The training loop."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from tpuspec.data.pipeline import HostBatch
from tpuspec.data.position import ENDED
from tpuspec.drain.drain import Drain, join_micro_steps
from tpuspec.loops.agreement import InputEnd
from tpuspec.loops.draw import draw
from tpuspec.loops.drift import DriftCheck
from tpuspec.loops.hooks import HookRunner
from tpuspec.loops.interruption import Interruption
from tpuspec.loops.iterations import LoopSizer
from tpuspec.loops.saving import Saver
from tpuspec.loops.session import Session
from tpuspec.spec.backend import CompiledStep, RunsSeveral
from tpuspec.spec.phase import mark_step
from tpuspec.spec.results import Batch, StepOutput, StepRows

logger = logging.getLogger(__name__)

_MOST_READY, _READY_SECONDS = 8, 2e-4

_STALE_READS = ("deleted or donated", "while an async operation is in flight")


def explain_stale_read(error: BaseException) -> None:
    """Adds a note to the runtime's error where it comes from reading a model's weights within a loop."""
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _STALE_READS):
        error.add_note("Within a loop of iterations_per_loop steps the newest state lives in the compiled program. The "
                       "module and the optimizer can be read only at loop boundaries (hooks, checkpoints, after "
                       "train()), or pass what you need as a tensor of host_call.")


@dataclass(slots=True, kw_only=True)
class TrainLoop:
    """Trains until the last step, the end of the input, or a stop request.

    Order of events:

        hooks.begin; save the first checkpoint
        while steps are left and nobody asked to stop:
          hooks.before_run
          iterations_per_loop times: draw a batch, feed it, dispatch the step, submit it to the drain
            (steps_per_execution of them at a time, once the step is captured)
          publish the state, where somebody reads it; if it is time, wait for the host work and save; hooks.after_run
        wait for the host work; save the last checkpoint; hooks.end

    A signal stops it after the step under way, breaks off a wait for the input, and is given up waiting for where a
    hook or a host function takes longer than half of the grace time. The last finished step is saved in each case.

    Attributes:
      session: model, optimizers, and the step count that is moved on.
      step: the compiled training step.
      batches: the input.
      sizer: sizes of loops.
      drain: takes each step's outputs to the host.
      hooks: of this call.
      saver: of checkpoints.
      drift: compares the replicas.
      interruption: the signal that came, if one did.
      restored: whether the first state stands in a checkpoint already.
      input_end: ends the input of the other hosts, where this one stops before its end.
      clock: seconds, for loops that fill a time.
    """

    session: Session
    step: CompiledStep
    batches: Iterator[HostBatch]
    sizer: LoopSizer
    drain: Drain
    hooks: HookRunner
    saver: Saver
    drift: DriftCheck
    interruption: Interruption
    restored: bool = False
    input_end: InputEnd = field(default_factory=InputEnd)
    clock: Callable[[], float] = field(default=time.perf_counter)
    _is_in_step: bool = field(default=False, init=False)
    _ahead: deque[HostBatch] = field(default_factory=deque, init=False)
    _ready: deque[tuple[HostBatch, list[Batch]]] = field(default_factory=deque, init=False)
    _input_error: Exception | None = field(default=None, init=False)
    _several: RunsSeveral | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._several = self.step if isinstance(self.step, RunsSeveral) else None

    def run(self) -> bool:
        """Trains; returns whether the input ended before the last step."""
        with self.hooks:
            try:
                with self.interruption.breaks_off(is_alone=not self.input_end.is_shared):
                    return self._run_saved()
            except BaseException as error:
                mark_step(error, self.session.global_step + 1)
                explain_stale_read(error)
                with contextlib.suppress(Exception):
                    self.step.publish()
                with contextlib.suppress(Exception):
                    self.session.settle()
                raise

    def _run_saved(self) -> bool:
        """Runs; saves the last finished step where a signal breaks it off between two steps."""
        try:
            return self._run()
        except (KeyboardInterrupt, SystemExit):
            if self._is_in_step or not self.interruption.is_first:
                raise
            self._finish()
            return False

    def _run(self) -> bool:
        session, context, input_ended = self.session, self.hooks.context, False
        if self.saver.begin(session.global_step, is_saved=self.restored):
            context.request_stop()
        while not input_ended and (
                size := self.sizer.next_size(session.global_step, stops=context.stop_requested)):
            session.check_not_lent("train()")
            self.hooks.before_run(session.global_step)
            begun, first = self.clock(), session.global_step
            input_ended, last_outputs = self._run_steps(size)
            is_due = self.saver.is_due(session.global_step)
            is_read = self.hooks.are_any or self.drift.compares or (is_due and self.saver.reads_tensors)
            if is_read or is_due:  # nobody else reads modules and optimizers
                self.step.publish(readable=is_read)
            self.sizer.finished(self.clock() - begun, session.global_step - first)
            self.drift.at_boundary(session.global_step)
            if is_due:
                self.drain.flush()  # no state is saved behind a step whose host work failed
                if self.saver.save(session.global_step):
                    context.request_stop()
            if session.global_step > first:
                self.hooks.after_run(session.global_step, last_outputs[0].functions.hooks)
        self._finish()
        return input_ended

    def _finish(self) -> None:
        self.interruption.may_break_off = False
        self.input_end.end()
        self.step.publish()
        if not self.drain.flush(self.interruption.host_work_seconds):
            logger.warning("host functions are too slow to be waited for in RunConfig.grace_seconds: step %d is saved "
                           "before they have run.", self.session.global_step)
        self.saver.end(self.session.global_step)

    def _run_steps(self, num_steps: int) -> tuple[bool, list[StepOutput]]:
        """Dispatches up to `num_steps` updates; returns whether the input ended, and the last outputs."""
        outputs: list[StepOutput] = []
        first_step, last_step = self.session.global_step, self.session.global_step + num_steps
        while self.session.global_step < last_step:
            if self.hooks.context.stop_requested:  # by a signal; hooks ask at boundaries
                self.input_end.end()  # the other hosts are within this loop too
                return self.input_end.was_stopped, outputs
            if self._several is not None and (
                    batches := self._draw_several(self._several.num_at_once, last_step - self.session.global_step)):
                last = self._run_several(self._several, batches)
                outputs = last or outputs
                continue
            # The first step may be traced, as hooks have run.
            is_first = self.session.global_step == first_step
            update = self._run_update(1 if is_first else last_step - self.session.global_step)
            if update is None:
                self.input_end.end()  # a signal may have broken the draw off: the others must not wait for it
                return True, outputs
            outputs, rows = update
            self.session.count_update()
            self._is_in_step = False
            self.saver.check()
            self.drain.submit(self.session.global_step, outputs, rows)
        return False, outputs

    def _run_update(self, num_left: int) -> tuple[list[StepOutput], StepRows] | None:
        """Dispatches the batches of one update, several while gradients accumulate; None at the end of the input.

        Args:
          num_left: updates until the next boundary that may be replayed.
        """
        micro_steps: list[list[StepOutput]] = []
        num_rows, position = 0, self.session.input_position
        while not micro_steps or not micro_steps[-1][0].is_update:
            drawn = self._draw(num_left)
            if drawn is None:
                if micro_steps:
                    self.session.drop_gradients()
                    logger.warning("the input ended within an update: %d batches of accumulated gradients are dropped.",
                                   len(micro_steps))
                # By another host, or by a signal: it stands within its input.
                if not self.input_end.was_stopped and self.interruption.signal is None:
                    self.session.input_position = [ENDED]
                return None
            batch, fed = drawn
            num_rows += batch.rows.num_rows
            self._is_in_step = True
            micro_steps.append(self.step(fed, len(micro_steps)))
            position = batch.position
        self.session.input_position = position
        return join_micro_steps(micro_steps), _all_real(num_rows)

    def _draw(self, num_left: int) -> tuple[HostBatch, list[Batch]] | None:
        """Returns the next batch, also as it is fed; None at the end of the input.

        Where that is quick, a few are made ready at once: the processor does one thing several times quicker than
        several in turn. They are fewer than the steps that are replayed until the next boundary or trace, so that user
        code finds the input where it would be without that.
        """
        if self._ready:
            return self._ready.popleft()
        feed = self.session.backend.feed
        if self._ahead:
            batch = self._ahead.popleft()
            return batch, feed(batch.replicas)
        if self._input_error is not None:
            raise self._input_error
        begun, batch = self.clock(), self._draw_next()
        if batch is None:
            return None
        first = batch, feed(batch.replicas)
        # Hosts ask one another at each batch, and must not wait there for a step that another one has to dispatch.
        if self._several is not None and not self.input_end.is_shared:
            most = min(num_left, self._several.num_replays_ahead, _MOST_READY)
            while len(self._ready) + 1 < most and self.clock() - begun < _READY_SECONDS:
                try:
                    batch = self._draw_next()
                    if batch is None:
                        break
                    self._ready.append((batch, feed(batch.replicas)))
                except Exception as error:
                    self._input_error = error
                    break
        return first

    def _draw_next(self) -> HostBatch | None:
        return draw(self.batches, self.interruption, self.input_end)

    def _draw_several(self, num_steps: int, num_left: int) -> list[HostBatch]:
        """Draws the batches of a program of several steps; [] where the next steps run one at a time.

        The steps before the end of the input, or before an error of it, do too.
        """
        if num_steps == 1 or num_steps > num_left or self._ready or self._input_error is not None:
            return []
        while len(self._ahead) < num_steps:
            try:
                batch = self._draw_next()
            except Exception as error:
                self._input_error = error
                return []
            if batch is None:
                return []
            self._ahead.append(batch)
        return [self._ahead.popleft() for _ in range(num_steps)]

    def _run_several(self, step: RunsSeveral, batches: Sequence[HostBatch]) -> list[StepOutput] | None:
        """Dispatches the updates of several batches as one program; returns the last outputs.

        None where they need programs of their own: the batches are the next ones then.
        """
        first, self._is_in_step = self.session.global_step, True
        try:
            outputs = step.run_several(
                step.feed_several([batch.replicas for batch in batches]), self.session.count_update)
        except BaseException:
            self.session.take_back_updates(first)
            raise
        if outputs is None:
            self.session.take_back_updates(first)
            self._ahead.extendleft(reversed(batches))
            self._is_in_step = False
            return None
        self.session.input_position = batches[-1].position
        self._is_in_step = False
        self.saver.check()
        for number, (batch, of_step) in enumerate(zip(batches, outputs, strict=True), start=first + 1):
            self.drain.submit(number, of_step, _all_real(batch.rows.num_rows))
        return outputs[-1]


@functools.lru_cache
def _all_real(num_rows: int) -> StepRows:
    return StepRows(mask=torch.ones(num_rows, dtype=torch.bool), num_rows=num_rows)
