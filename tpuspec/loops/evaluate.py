"""The evaluation loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from tpuspec.data.pipeline import HostBatch
from tpuspec.host.drain import Drain
from tpuspec.loops.agreement import InputEnd
from tpuspec.loops.draw import draw
from tpuspec.loops.hooks import HookRunner
from tpuspec.loops.interruption import Interruption
from tpuspec.spec.backend import Backend, CompiledStep


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

    def run(self) -> int:
        """Evaluates; returns the number of steps, fewer where a signal came."""
        num_steps = 0
        with self.hooks, self.interruption.stops(self.hooks.context.request_stop), self.interruption.breaks_off(
                is_alone=not self.input_end.is_shared):
            if not self.hooks_per_step:
                self.hooks.before_run(0)
            while (self.max_steps is None or num_steps < self.max_steps) and not self.hooks.context.stop_requested:
                batch = draw(self.batches, self.interruption, self.input_end)
                if batch is None:
                    break
                if self.hooks_per_step:
                    self.hooks.before_run(num_steps)
                outputs = self.step(self.backend.feed(batch.replicas))
                num_steps += 1
                self.drain.submit(num_steps, outputs, batch.rows)
                if self.hooks_per_step:
                    self.hooks.after_run(num_steps, outputs[0].functions.hooks)
            self.input_end.end()
            self.step.publish()
            self.drain.flush()
            if not self.hooks_per_step:
                self.hooks.after_run(num_steps)
        return num_steps
