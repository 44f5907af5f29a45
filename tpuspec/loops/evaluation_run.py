"""One evaluation, once its weights are in place: the loop with its drain, hooks, metrics and results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tpuspec.drain.drain import Drain
from tpuspec.drain.executor import HostExecutor
from tpuspec.drain.metric_state import MetricState
from tpuspec.loops.agreement import leave_to_chief
from tpuspec.loops.evaluate import EvaluateLoop
from tpuspec.loops.hooks import HookRunner
from tpuspec.loops.host_work import EvalWork
from tpuspec.loops.interruption import Interruption
from tpuspec.loops.prepare import Prepared
from tpuspec.loops.report import write_results
from tpuspec.loops.session import Session
from tpuspec.spec.hooks import HookContext, SessionRunHook
from tpuspec.spec.mode import ModeKeys
from tpuspec.spec.results import EvalResult
from tpuspec.summary.progress import Progress
from tpuspec.summary.writer import SummaryWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRun:
    """Evaluates once over an input.

    Attributes:
      session: with the weights to evaluate.
      prepared: input and step.
      hooks: of this call.
      hooks_per_step: whether they fire around each step.
      queue_size: steps that may wait for host work.
      title: of this evaluation, for people.
      progress: the progress line.
      interruption: takes the signals of this call.
    """

    session: Session
    prepared: Prepared
    hooks: Sequence[SessionRunHook]
    hooks_per_step: bool
    queue_size: int
    title: str
    progress: Progress
    interruption: Interruption

    def run(self, writer: SummaryWriter, max_steps: int | None, evaluated: str | None) -> tuple[EvalResult, int]:
        """Returns the results, on every host those of the chief, and the number of real rows seen here.

        Args:
          writer: of the evaluation's folder; gets the results.
          max_steps: batches at most; None runs to the end.
          evaluated: path of the evaluated checkpoint, if it is one.

        Raises:
          KeyboardInterrupt, SystemExit: a signal came; there are no results of a part of the input.
        """
        session, prepared = self.session, self.prepared
        backend, metrics = session.backend, MetricState()
        context = HookContext(mode=ModeKeys.EVAL, model=session.module)
        work = EvalWork(writer=writer, metrics=metrics, progress=self.progress, step_kind=lambda: backend.step_kind,
                        global_step=session.global_step)
        results: list[EvalResult] = []

        def finish() -> None:
            self.interruption.agree(backend.coordinator)
            self.interruption.end()
            result = {**metrics.compute(), "loss": work.loss.compute(), "global_step": session.global_step}
            results.append(backend.coordinator.share(result))
            context.read_metrics = lambda: results[0]

        self.progress.start(self.title, max_steps)
        try:
            with HostExecutor(self.queue_size) as executor:
                EvaluateLoop(
                    backend=backend, step=prepared.step, batches=prepared.batches, max_steps=max_steps,
                    drain=Drain(backend.fetch, executor, copies=prepared.copies,
                                work=work if backend.coordinator.is_chief else leave_to_chief),
                    input_end=prepared.input_end, interruption=self.interruption, hooks_per_step=self.hooks_per_step,
                    finish=finish,
                    hooks=HookRunner(self.hooks, context, writer=writer, summary_step=session.global_step)).run()
        finally:
            metrics.reset_owned()
            self.progress.stop()
        work.loss.warn_of_padding()
        (result,) = results
        write_results(writer, result, evaluated)
        return result, work.num_rows
