"""The evaluation loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tpuspec.data.pipeline import HostBatch
from tpuspec.drain.drain import Drain
from tpuspec.loops.agreement import InputEnd
from tpuspec.loops.draw import draw
from tpuspec.loops.hooks import HookRunner
from tpuspec.loops.interruption import Interruption
from tpuspec.spec.backend import Backend, CompiledStep
from tpuspec.spec.phase import mark_step


@dataclass(slots=True, kw_only=True)
class EvaluateLoop:
    """Runs every batch once, or the first `max_steps` of them; hooks fire once around all steps.

    Attributes:
      backend: the device runtime.
      step: the compiled evaluation step.
      batches: the input.
      drain: takes each step's outputs to the host.
      hooks: of this call.
      interruption: the signal that came, if one did.
      max_steps: steps at most; None for all.
      input_end: ends the input of the other hosts, where this one stops before its end.
      hooks_per_step: whether hooks fire around each step, as without XLA.
      finish: called after the last step and its host work, before the hooks end.
    """

    backend: Backend
    step: CompiledStep
    batches: Iterator[HostBatch]
    drain: Drain
    hooks: HookRunner
    interruption: Interruption
    max_steps: int | None = None
    input_end: InputEnd = field(default_factory=InputEnd)
    hooks_per_step: bool = False
    finish: Callable[[], None] = field(default=lambda: None)
    _num_steps: int = field(default=0, init=False)

    def run(self) -> int:
        """Evaluates; returns the number of steps, fewer where a signal came."""
        is_over = False
        try:
            with self.hooks:
                with self.interruption.stops(self.hooks.context.request_stop), self.interruption.breaks_off(
                        is_alone=not self.input_end.is_shared):
                    self._run()
                is_over = True
                self.finish()
        except BaseException as error:
            if not is_over:
                mark_step(error, self._num_steps + 1)
            raise
        return self._num_steps

    def _run(self) -> None:
        if not self.hooks_per_step:
            self.hooks.before_run(0)
        while (self.max_steps is None or self._num_steps < self.max_steps) and not self.hooks.context.stop_requested:
            batch = draw(self.batches, self.interruption, self.input_end)
            if batch is None:
                break
            if self.hooks_per_step:
                self.hooks.before_run(self._num_steps)
            outputs = self.step(self.backend.feed(batch.replicas))
            self._num_steps += 1
            self.drain.submit(self._num_steps, outputs, batch.rows)
            if self.hooks_per_step:
                self.hooks.after_run(self._num_steps, outputs[0].functions.hooks)
        self.input_end.end()
        self.step.publish()
        self.drain.flush(self.interruption.host_work_seconds)
        if not self.hooks_per_step:
            self.hooks.after_run(self._num_steps)
