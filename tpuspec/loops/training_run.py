"""One call of train(), once all is checked and restored: the loop with its drain, hooks, host work and signals."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from tpuspec.config import LoopLength, RunConfig
from tpuspec.drain.drain import Drain
from tpuspec.drain.executor import HostExecutor
from tpuspec.errors import InputError
from tpuspec.loops.agreement import AgreedSizer, leave_to_chief
from tpuspec.loops.drift import DriftCheck
from tpuspec.loops.hooks import HookRunner
from tpuspec.loops.host_work import TrainWork
from tpuspec.loops.interruption import Interruption
from tpuspec.loops.prepare import Prepared
from tpuspec.loops.saving import Saver
from tpuspec.loops.session import Session
from tpuspec.loops.train import TrainLoop
from tpuspec.spec.hooks import HookContext, SessionRunHook
from tpuspec.spec.mode import ModeKeys
from tpuspec.summary.progress import Progress
from tpuspec.summary.writer import SummaryWriter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """Trains to a step, and tells people how it ended.

    Attributes:
      session: the restored state.
      prepared: input and step.
      saver: of checkpoints.
      hooks: of this call.
      config: the run's settings.
      loop_length: of the loops between two boundaries.
      progress: the progress line.
      restored: whether the first state stands in a checkpoint already.
      interruption: takes the signals of this call.
    """

    session: Session
    prepared: Prepared
    saver: Saver
    hooks: Sequence[SessionRunHook]
    config: RunConfig
    loop_length: LoopLength
    progress: Progress
    restored: bool
    interruption: Interruption

    def run(self, writer: SummaryWriter, last_step: int | None) -> None:
        """Trains until `last_step`, the end of the input, a stop request or a signal.

        Args:
          writer: of model_dir.
          last_step: global step to end at; None for none.

        Raises:
          What `Trainer.train` raises, but for the end that a signal asks for.
        """
        session, first_step = self.session, self.session.global_step
        self._tell_of_end(first_step, last_step)
        input_ended = self._run_loop(writer, last_step)
        self.interruption.agree(session.backend.coordinator)
        if self.interruption.signal is None:
            if input_ended and last_step is not None and not self.prepared.input_end.was_stopped:
                self._tell(f"the input ended at step {session.global_step} of {last_step}. Return a Dataset, or repeat "
                           "the batches in input_fn, to train on.")
            if session.global_step == first_step:
                logger.warning("Training with estimator made no steps. Perhaps input is empty or misspecified.")

    def _tell_of_end(self, step: int, last_step: int | None) -> None:
        """Says before the first step what the length of the input, where it is known, will lead to."""
        # Where an update takes several batches, the input ends earlier, and the short batch comes earlier.
        short_step, num_steps = self.prepared.short_step, self.prepared.num_steps
        if short_step is not None and (last_step is None or step + short_step <= last_step):
            raise InputError(
                f"every training batch must have params['batch_size'] rows, and batch {short_step} of the input, its "
                "last one, has fewer. Drop a short last batch (drop_last=True).")
        if num_steps is not None and last_step is not None and step + num_steps < last_step:
            self._tell(f"the input has batches for at most {num_steps} steps: training will end by step "
                       f"{step + num_steps} of {last_step}. Return a Dataset, or repeat the batches in input_fn, to "
                       "train on.")

    def _tell(self, text: str) -> None:
        if not self.progress.message(text) and self.session.backend.coordinator.is_chief:
            logger.warning(text)

    def _run_loop(self, writer: SummaryWriter, last_step: int | None) -> bool:
        config, session, prepared = self.config, self.session, self.prepared
        coordinator = session.backend.coordinator
        work = TrainWork(
            writer=writer, progress=self.progress, step_kind=lambda: session.backend.step_kind,
            summary_every=config.save_summary_steps, log_every=config.log_step_count_steps,
            stop_on_nan=config.stop_on_nan)
        context = HookContext(mode=ModeKeys.TRAIN, model=session.module, step=session.global_step,
                              optimizer=session.optimizer, read_metrics=lambda: session.metrics)
        self.progress.start("train", last_step)
        try:
            # The steps of a program end at once.
            queue_size = config.host_queue_size * config.tpu_config.steps_per_execution
            with self.interruption.stops(context.request_stop), HostExecutor(queue_size) as executor:
                drain = Drain(session.backend.fetch, executor, copies=prepared.copies,
                              work=work if coordinator.is_chief else leave_to_chief,
                              host_call_every=config.tpu_config.host_call_every_n_steps)
                context.read_loss = lambda: work.newest_loss if drain.flush() else None
                return TrainLoop(
                    session=session, step=prepared.step, batches=prepared.batches,
                    sizer=AgreedSizer(coordinator, self.loop_length, last_step), saver=self.saver,
                    drift=DriftCheck(session=session, most_steps=config.audit_every_steps),
                    restored=self.restored, input_end=prepared.input_end, interruption=self.interruption, drain=drain,
                    hooks=HookRunner(self.hooks, context, writer=writer)).run()
        finally:
            with contextlib.ExitStack() as stack:  # each of them, whatever another one raises
                stack.callback(self.saver.close)
                stack.callback(self.progress.stop)
                stack.callback(work.finish)
