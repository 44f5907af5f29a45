"""One call of predict(), once its weights are in place: the loop with its worker and hooks, and what is yielded."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from tpuspec.drain.executor import HostExecutor
from tpuspec.loops.agreement import ends_input
from tpuspec.loops.hooks import HookRunner
from tpuspec.loops.predict import PredictLoop, select_predictions, single_examples
from tpuspec.loops.prepare import Prepared
from tpuspec.loops.session import Session
from tpuspec.spec.hooks import HookContext, SessionRunHook
from tpuspec.spec.mode import ModeKeys
from tpuspec.summary.writer import SummaryWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionRun:
    """Predicts once over an input.

    Attributes:
      session: with the weights to predict with.
      prepared: input and step.
      hooks: of this call.
      queue_size: steps that may wait for host work, and that are computed ahead.
      predict_keys: names to yield; None yields all.
      yield_single_examples: whether rows are yielded, else batches.
    """

    session: Session
    prepared: Prepared
    hooks: Sequence[SessionRunHook]
    queue_size: int
    predict_keys: Sequence[str] | None
    yield_single_examples: bool

    def run(self, writer: SummaryWriter) -> Generator[Any, None, None]:
        """Yields what `Trainer.predict` does; nothing on hosts that are not the chief.

        Args:
          writer: default writer of host_call.
        """
        session, prepared = self.session, self.prepared
        backend = session.backend
        with contextlib.ExitStack() as stack:
            executor = stack.enter_context(HostExecutor(self.queue_size))
            context = HookContext(mode=ModeKeys.PREDICT, model=session.module)
            loop = PredictLoop(
                backend=backend, step=prepared.step, batches=prepared.batches, executor=executor,
                copies=prepared.copies, most_ahead=self.queue_size, writer=writer, global_step=session.global_step,
                input_end=prepared.input_end,
                hooks=HookRunner(self.hooks, context, writer=writer, summary_step=session.global_step))
            stack.enter_context(session.with_buffers_of_chief())
            stack.push(ends_input(prepared.input_end))
            with contextlib.closing(loop.run()) as steps:
                for step in steps:
                    kept = loop.take_kept(step)
                    if backend.coordinator.is_chief:
                        predictions = select_predictions(step.join("predictions"), self.predict_keys, kept)
                        yield from single_examples(predictions) if self.yield_single_examples else (predictions,)
