"""The captured step: traced until two traces are equal, then replayed without running Python code.

Within a loop the newest state lives in `ReplicaState.values`; module and optimizers hold it again after `publish`. One
replica is traced, and an engine runs its program for all of them.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from tpuspec.config import CaptureMode
from tpuspec.errors import CaptureError
from tpuspec.spec.backend import CompiledStep, StepFunction
from tpuspec.spec.engine import OfStep
from tpuspec.spec.results import StepOutput, rebuild
from tpuspec.spec.user_threads import USER_CODE
from tpuspec.tracer import graph
from tpuspec.tracer.kept_programs import KeptPrograms, Key
from tpuspec.tracer.number_plan import NumberPlan
from tpuspec.tracer.optimizer_numbers import OptimizerNumbers
from tpuspec.tracer.program import Program
from tpuspec.tracer.python_state import Memory
from tpuspec.tracer.recording import (
    Before,
    Recording,
    Watch,
    compile_recording,
    record,
    undone_on_error,
)
from tpuspec.tracer.replica_state import ReplicaState
from tpuspec.tracer.sent_batch import SentBatch
from tpuspec.tracer.sources import Source

logger = logging.getLogger(__name__)

_QUIET_COMPILES = 3
"""Of one form of batch while steps are traced: optimizers make their state in the first one."""


class CapturedStep:
    """A step that is captured as soon as it may be; see `spec.backend.CompiledStep`.

    Args:
      step: of one replica.
      state: of the replica that is traced; its other steps go on from there.
      mode: `off` traces every step anew, `require` raises where a step cannot be captured.
      audit_every: replays between two traces that check that the step is still what was captured.
      enter: makes the backend the one that steps reduce with; a context manager for each trace.
      name: of the step in messages.
      fallback: runs a step that reads the device while it is traced; None where that is an error.
      num_stacked: replicas whose outputs are stacked in those of `step`; 0 for one.

    Attributes:
      kind: how the newest step ran, 'replay' or 'traced'. The check of a step that is replayed is a replay too.
    """

    def __init__(self, step: StepFunction, state: ReplicaState, *, mode: CaptureMode, audit_every: int,
                 enter: Callable[[], Any], name: str, fallback: CompiledStep | None = None,
                 num_stacked: int = 0) -> None:
        self.kind = "traced"
        self._step, self._name = step, name
        self._state, self._replica, self._runtime = state, state.replica, state.runtime
        self._enter, self._fallback, self._num_stacked = enter, fallback, num_stacked
        self._is_alone = state.runtime.engine.num_devices == 1
        self._of_optimizers = OptimizerNumbers(state.replica)
        self._counters: dict[tuple[Hashable, ...], int] = {}
        self._counters_now = 0
        self._user_code = -1
        self._others: list[Any] = []
        self._in_flight = self._has_replayed = self._has_read = False
        self._num_reading = 0  # traces in a row: optimizers may read while they make their state
        self._written: set[int] = set()
        self._written_by: Program | None = None
        self._newest: Program | None = None
        self._memory = Memory(step, state.replica)
        self._programs = KeptPrograms(name, state.replica, self._memory, self._runtime, mode=mode,
                                      audit_every=audit_every)
        self._numbers = self._programs.numbers
        self._num_compiles: dict[Hashable, int] = {}

    def __call__(self, batches: Sequence[Any], micro_step: int = 0) -> list[StepOutput]:
        """Dispatches one step on the batch of all replicas; does not wait for it."""
        (batch,) = batches
        if self._programs.gave_up:
            return [self._trace(batch, micro_step, None)]
        key, program = self._next(batch, micro_step)
        if program is None or (program.num_replays >= program.audit_at and micro_step == 0):
            self.publish()
            return [self._trace(batch, micro_step, key)]
        program.num_replays += 1
        self._has_replayed = True
        self.kind = "replay"
        return [self._replay(program, batch)]

    def _next(self, batch: SentBatch, micro_step: int) -> tuple[Key, Program | None]:
        """Prepares the next step; returns its key, and the program that may be replayed for it."""
        if (others := self._of_optimizers.others()) != self._others:
            self.publish()  # a schedule has moved what is no number
            self._programs.doubt()
            self._others = others
        if not self._in_flight:
            self._adopt()
        of_plans = (micro_step, batch.form, self._counters_now)
        key = (*of_plans, self._prepared(self._programs.plans.get(of_plans, ())))
        for program in self._programs.trusted.get(key, ()):
            if program.may_run(self._state, batch, self._numbers):
                return key, program if self._of_optimizers.are(program.known) else None
        return key, None

    def publish(self, *, readable: bool = True) -> None:
        """Gives the newest state back to modules and optimizers."""
        if self._fallback is not None:
            self._fallback.publish()
        if self._in_flight:
            self._state.publish(self._numbers, self._written, readable=readable)
            self._of_optimizers.publish()
            self._written.clear()
            self._written_by = None
            self._in_flight = False
            if self._has_replayed:
                self._has_replayed = False
                self._programs.check_settings()
        if readable and self._state.holder in (None, self):
            self._state.make_readable()

    def _prepared(self, plans: Sequence[NumberPlan]) -> int:
        """Prepares the optimizers' numbers by the first plan that serves; returns its place, or that of a new one."""
        for i, plan in enumerate(plans):
            if self._of_optimizers.prepare(plan):
                return i
        return len(plans)

    def _adopt(self) -> None:
        if (holder := self._state.holder) not in (None, self):
            holder.publish()
        self._state.holder = self
        self._of_optimizers.settle()
        self._counters_now = self._counters.setdefault(self._of_optimizers.adopt(), len(self._counters))
        self._state.adopt(self._numbers)
        self._in_flight = True
        if self._user_code != USER_CODE.num_runs:
            self._user_code = USER_CODE.num_runs
            self._programs.doubt()
            self._programs.forget_settings()

    def _trace(self, batch: SentBatch, micro_step: int, key: Key | None) -> StepOutput:
        """Runs a step by tracing it; makes it a program if that is safe; says what it costs if it is compiled anew."""
        begun, num_compiles = time.perf_counter(), self._runtime.engine.num_compiles
        output = self._run_traced(batch, micro_step, key)
        if self._runtime.engine.num_compiles == num_compiles:
            self._programs.seconds = time.perf_counter() - begun
        elif self._programs.gave_up:
            form = (micro_step, batch.form)
            self._num_compiles[form] = num = self._num_compiles.get(form, 0) + 1
            if num == _QUIET_COMPILES + 1:
                logger.warning("%s is compiled anew time and again, by now %d times for one form of batch; the newest "
                               "took %.2g s: %s.", self._name, num, time.perf_counter() - begun, self._programs.reason)
        return output

    def _run_traced(self, batch: SentBatch, micro_step: int, key: Key | None) -> StepOutput:
        self.kind = "traced"
        if self._fallback is not None and self._programs.gave_up and self._num_reading > 1:
            self._state.make_readable()
            (output,) = self._fallback([batch], micro_step)  # type: ignore[list-item]  # a Batch in all but name
            return output
        if (holder := self._state.holder) not in (None, self):
            holder.publish()
        self._of_optimizers.settle()
        self._state.make_readable()
        before = Before(self._replica, self._runtime)
        with undone_on_error(before):
            recording = self._record(batch, micro_step, before, watch=self._programs.watch_of(key))
            if key is not None:
                self.kind = self._programs.judge(key, recording)
        result = self._state.launch(recording, before, batch)
        return self._output(recording.output, [
            batch.arrays[source.key] if source.kind == "batch" else result[source.key]
            for source in recording.sources])

    def _output(self, form: StepOutput, tensors: Sequence[Any]) -> StepOutput:
        return StepOutput(tensors=rebuild(form.tensors, iter(tensors)), functions=form.functions,
                          is_update=form.is_update, num_stacked=self._num_stacked or form.num_stacked)

    def _record(self, batch: SentBatch, micro_step: int, before: Before, *, watch: Watch) -> Recording:
        state, device = self._state, self._state.device
        with self._enter(), torch.autograd.set_multithreading_enabled(False):
            state.note(before)
            seed = graph.get_seed(device)
            record_with = functools.partial(
                record, self._replica, self._step, batch, micro_step, before=before, numbers=self._of_optimizers,
                memory=self._memory, runtime=self._runtime, inputs_of=state.inputs_of(before, batch),
                is_alone=self._is_alone)
            recording = record_with(watch=watch, locate=self._has_read)
            has_values = self._runtime.engine.has_values
            if recording.has_read and not (self._is_alone and has_values):
                before.restore()
                graph.set_seed(seed, device)
                notes = record_with(watch=Watch.device, locate=True).notes or recording.notes
                if not has_values:
                    raise CaptureError(f"{notes[0]}. A plan runs nothing that could be read.")
                raise CaptureError(f"{self._name} cannot run on several devices: {notes[0]}. One program serves all of "
                                   "them, and what it reads would be the first replica's.")
            compile_recording(recording, device, self._runtime)
            graph.set_seed(graph.next_seed(seed), device)
        self._has_read = recording.has_read
        self._num_reading = self._num_reading + 1 if self._has_read else 0
        return recording

    def _replay(self, program: Program, batch: SentBatch) -> StepOutput:
        self._newest = program
        state, sent = self._state, batch.arrays
        if program.written:
            state.leave_module()
        feed = program.feed(state, sent, self._of_optimizers)
        state.seed = graph.next_seed(state.seed)
        result = program.compiled.run(feed) if program.compiled else []
        self._of_optimizers.advance()
        state.values = program.write(state.values, result)
        if self._written_by is not program:
            self._written_by = program
            self._written.update(program.written, program.dropped)
        return self._output(program.output, [sent[number] if from_batch else result[number]
                                             for from_batch, number in program.sources])

    @property
    def num_replays_ahead(self) -> int:
        """Steps that will not be traced, if nothing happens meanwhile; 0 where that is not known."""
        program = self._newest
        return program.audit_at - program.num_replays if program is not None and self.kind == "replay" else 0

    @property
    def inputs(self) -> list[Source] | None:
        """Where the inputs of the program that was replayed last come from; None before one was."""
        return None if self._newest is None else self._newest.recording.inputs

    def may_run_several(self, num_steps: int) -> bool:
        """Whether so many steps may come before the next audit, as one program."""
        program = self._newest
        return program is not None and program.may_loop and self.num_replays_ahead >= num_steps

    def run_several(self, batches: Sequence[Sequence[SentBatch]], after_each: Callable[[], None],
                    ) -> list[list[StepOutput]] | None:
        """Replays one program for several steps, as a loop on an engine's device; does not wait for it.

        Args:
          batches: for each step that of all replicas.
          after_each: called once a step, after its learning rates were read: it sets those of the next one.

        Returns:
          For each step its output; None where the steps need more than one program, and none was dispatched.
        """
        _, program = self._next(batches[0][0], 0)
        if program is None or program.num_replays + len(batches) > program.audit_at or (
                loop := program.loop(len(batches), self._runtime.engine)) is None:
            return None
        mark = self._of_optimizers.mark()
        try:
            numbers = self._numbers_of(program, batches, after_each)
        except BaseException:
            self._of_optimizers.go_back(mark)
            raise
        if numbers is None:
            self._of_optimizers.go_back(mark)
            return None
        state = self._state
        program.num_replays += len(batches)
        self._has_replayed, self.kind = True, "replay"
        state.leave_module()
        sent = [parts[0].arrays for parts in batches]
        assert batches[0][0].of_steps is not None, "fed as those of several steps"
        results = loop.run(loop.feed(state, batches[0][0].of_steps, numbers))
        state.values = program.write(state.values, results)
        self._written.update(program.written)
        return [[self._output(program.output, [sent[step][number] if from_batch else OfStep(results[number], step)
                                       for from_batch, number in program.sources])] for step in range(len(batches))]

    def _numbers_of(self, program: Program, batches: Sequence[Sequence[SentBatch]], after_each: Callable[[], None],
                    ) -> list[tuple[NumberPlan, list[Any]]] | None:
        """Returns the numbers of the optimizers in each of several steps; None where a step needs another program."""
        numbers, others = [], self._others
        for i, parts in enumerate(batches):
            if i and (self._of_optimizers.others() != others or self._next(parts[0], 0)[1] is not program):
                return None
            numbers.append(self._of_optimizers.prepared())
            self._of_optimizers.advance()
            after_each()
        return numbers
