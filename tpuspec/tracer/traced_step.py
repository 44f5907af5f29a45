"""A step that torch_xla traces, compiles and runs each time, as where it reads the device while it is traced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tpuspec.spec.backend import Replica, StepFunction
from tpuspec.spec.phase import in_phase
from tpuspec.spec.results import Batch, StepOutput
from tpuspec.tracer import graph
from tpuspec.tracer.optimizer_numbers import OptimizerNumbers
from tpuspec.tracer.slots import read_slots


@dataclass(slots=True, kw_only=True)
class TracedStep:
    """Traces, compiles where the graph is new, and dispatches each step of one replica, as plain torch_xla does.

    Attributes:
      compiled: number of a batch within an update -> whether its newest step had to be compiled.
    """

    step: StepFunction
    replica: Replica
    enter: Callable[[], Any]
    numbers: OptimizerNumbers
    compiled: dict[int, bool] = field(default_factory=dict)
    _is_settled: bool = field(default=False, init=False)

    def publish(self, *, readable: bool = True) -> None:
        """A boundary: what hooks write there is no part of the next step, whose bits it would change."""
        self._is_settled = False

    def __call__(self, batches: Sequence[Batch], micro_step: int = 0) -> list[StepOutput]:
        """Dispatches one step; does not wait for it."""
        if not self._is_settled:
            self.numbers.settle()
            graph.materialize(graph.waiting(list(read_slots(self.replica).values())), str(self.replica.device))
            self._is_settled = True
        device = str(self.replica.device)
        seed = graph.get_seed(device)
        # In this thread: torch's own backward threads are made at the first backward of the process, and know no XLA
        # device if that was before the client started.
        with (self.enter(), torch.autograd.set_multithreading_enabled(False),
              self.numbers.in_place()):
            outputs = [self.step(self.replica, batches[0], micro_step)]
        # Optimizers that make state in their first step have two graphs, so compiles come in a row.
        may_compile = self.compiled.get(micro_step, True)
        with in_phase("compile") if may_compile else contextlib.nullcontext():
            self.compiled[micro_step] = graph.end_step()
        graph.set_seed(graph.next_seed(seed), device)  # torch.utils.checkpoint may have set another one within the step
        return outputs
