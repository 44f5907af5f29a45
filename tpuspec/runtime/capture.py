"""The captured step: traced until two traces are equal, then replayed without running Python code.

Inside a loop the newest state lives in `ReplicaState.values`; the modules and optimizers hold it again after
`publish`. An engine's replicas are one, as its program is that of all of them. On a pod each device has its own, driven
by one thread: each traces and compiles in turn, which runs nothing, and only then is each launched, so that an error in
one replica's trace is that error and nothing waits for a peer that never comes.
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
from tpuspec.runtime import graph
from tpuspec.runtime.kept_programs import KeptPrograms, Key
from tpuspec.runtime.number_plan import NumberPlan
from tpuspec.runtime.optimizer_numbers import OptimizerNumbers
from tpuspec.runtime.optimizer_places import follow
from tpuspec.runtime.program import Program
from tpuspec.runtime.python_state import Memory
from tpuspec.runtime.recording import (
    Before,
    Recording,
    Watch,
    compile_recording,
    record,
    undone_on_error,
)
from tpuspec.runtime.replica_state import ReplicaState
from tpuspec.runtime.runtimes import OnTorchXla
from tpuspec.runtime.sent_batch import form_of
from tpuspec.spec.backend import CompiledStep, StepFunction
from tpuspec.spec.engine import OfStep
from tpuspec.spec.results import Batch, StepOutput, rebuild
from tpuspec.spec.user_threads import USER_CODE

logger = logging.getLogger(__name__)



_QUIET_COMPILES = 3
"""Of one form of batch while steps are traced: optimizers make their state in the first one."""


class CapturedStep:
    """A step over the local replicas that is captured as soon as it may be; see `spec.backend.CompiledStep`.

    Args:
      step: the step of one replica.
      states: of the local replicas, which are equal; other steps of theirs go on from there.
      mode: `off` traces every step anew, `require` raises where a step cannot be captured.
      audit_every: replays between two traces that check that the step is still what was captured.
      enter: makes the backend the one that steps reduce with; a context manager for each trace.
      name: of the step in messages.
      fallback: runs a step that is traced for good; None records and launches each.
      num_stacked: replicas whose outputs are stacked in those of `step`; 0 for one.

    Attributes:
      kind: how the newest step ran, 'replay' or 'traced'. The check of a step that is replayed is a replay too.
    """

    def __init__(self, step: StepFunction, states: Sequence[ReplicaState], *, mode: CaptureMode, audit_every: int,
                 enter: Callable[[], Any], name: str, fallback: CompiledStep | None = None,
                 num_stacked: int = 0) -> None:
        self.kind = "traced"
        self._step, self._name = step, name
        self._states = list(states)
        self._replicas = replicas = tuple(state.replica for state in states)
        self._runtime, self._is_apart = states[0].runtime, states[0].is_apart
        self._enter, self._fallback, self._num_stacked = enter, fallback, num_stacked
        self._several = len(replicas) > 1
        self._is_alone = states[0].num_replicas == 1
        self._of_optimizers = OptimizerNumbers(replicas)
        self._counters: dict[tuple[Hashable, ...], int] = {}
        self._counters_now = 0
        self._user_code = -1
        self._others: list[Any] = []
        self._in_flight = self._has_replayed = self._has_read = False
        self._num_reading = 0  # traces in a row: optimizers may read while they make their state
        self._written: set[int] = set()
        self._newest: Program | None = None
        self._memory = Memory(step, replicas[0])
        self._programs = KeptPrograms(name, replicas[0], self._memory, self._runtime, mode=mode,
                                      audit_every=audit_every)
        self._numbers = self._programs.numbers
        # What the newest step reads and writes. A thread of torch_xla that is the last to hold a buffer waits for the
        # step, and so for all replicas, perhaps with the launch of one of them in its hands: Eigen takes the next
        # task before it destroys the one before. The launches of the next step wait until these threads have let go.
        self._kept: Any = None
        self._num_compiles: dict[Hashable, int] = {}

    def __call__(self, batches: Sequence[Batch], micro_step: int = 0) -> list[StepOutput]:
        """Dispatches one step on each replica's batch; does not wait for it."""
        if self._programs.gave_up:
            return self._trace(batches, micro_step, None)
        key, program = self._next(batches, micro_step)
        if program is None or (program.num_replays >= program.audit_at and micro_step == 0):
            self.publish()
            return self._trace(batches, micro_step, key)
        program.num_replays += 1
        self._has_replayed = True
        self.kind = "replay"
        return self._replay(program, batches)

    def _next(self, batches: Sequence[Batch], micro_step: int) -> tuple[Key, Program | None]:
        """Prepares the next step; returns its key, and the program that may be replayed for it."""
        if (others := self._of_optimizers.others()) != self._others:
            self.publish()  # a schedule has moved what is no number
            self._programs.doubt()
            self._others = others
        if not self._in_flight:
            self._adopt()
        of_plans = (micro_step, form_of(batches[0]), self._counters_now)
        key = (*of_plans, self._prepared(self._programs.plans.get(of_plans, ())))
        program = next((program for program in self._programs.trusted.get(key, ())
                        if program.may_run(self._states, batches, self._numbers)), None)
        return key, program if program is not None and self._of_optimizers.are(program.known) else None

    def publish(self) -> None:
        """Makes the newest state readable in the modules and optimizers."""
        if self._fallback is not None:
            self._fallback.publish()
        if self._in_flight:
            for state in self._states:
                state.publish(self._numbers, self._written)
                state.forget()
            self._of_optimizers.publish()
            self._written.clear()
            self._in_flight = False
            if self._has_replayed:
                self._has_replayed = False
                self._programs.check_settings()
        if self._states[0].holder in (None, self):
            self._make_readable()

    def _make_readable(self) -> None:
        for state in self._states:
            state.make_readable()

    def _prepared(self, plans: Sequence[NumberPlan]) -> int:
        """Prepares the optimizers' numbers by the first plan that serves; returns its place, or that of a new one."""
        return next((i for i, plan in enumerate(plans) if self._of_optimizers.prepare(plan)), len(plans))

    def _adopt(self) -> None:
        if (holder := self._states[0].holder) not in (None, self):
            holder.publish()
        self._states[0].holder = self
        self._follow_first_replica()
        self._of_optimizers.settle()
        self._counters_now = self._counters.setdefault(self._of_optimizers.adopt(), len(self._counters))
        for state in self._states:
            state.adopt(self._numbers)
        for state in self._states:
            state.values += [None] * (len(self._numbers) - len(state.values))
        self._in_flight = True
        if self._user_code != USER_CODE.num_runs:
            self._user_code = USER_CODE.num_runs
            self._programs.doubt()
            self._programs.forget_settings()

    def _follow_first_replica(self) -> None:
        """Gives what a hook or a schedule set on the first replica to the others."""
        for replica in self._replicas[1:]:
            follow(replica, self._replicas[0])

    def _trace(self, batches: Sequence[Batch], micro_step: int, key: Key | None) -> list[StepOutput]:
        """Runs a step by tracing it; makes it a program if that is safe; says what it costs if it is compiled anew."""
        begun, num_compiles = time.perf_counter(), self._runtime.num_compiles()
        outputs = self._run_traced(batches, micro_step, key)
        if self._runtime.num_compiles() == num_compiles:
            self._programs.seconds = time.perf_counter() - begun
        elif self._programs.gave_up:
            form = (micro_step, form_of(batches[0]))
            self._num_compiles[form] = num = self._num_compiles.get(form, 0) + 1
            if num == _QUIET_COMPILES + 1:
                logger.warning("%s is compiled anew time and again, by now %d times for one form of batch; the newest "
                               "took %.2g s: %s.", self._name, num, time.perf_counter() - begun, self._programs.reason)
        return outputs

    def _run_traced(self, batches: Sequence[Batch], micro_step: int, key: Key | None) -> list[StepOutput]:
        self.kind = "traced"
        if self._fallback is not None and self._programs.gave_up and (self._num_reading > 1 or not self._is_apart):
            self._make_readable()
            return self._fallback(batches, micro_step)
        if (holder := self._states[0].holder) not in (None, self):
            holder.publish()
        befores: list[Before] = []
        self._follow_first_replica()  # the schedule has moved on since the loop began
        self._of_optimizers.settle()
        with undone_on_error(befores):
            recordings = self._record(batches, micro_step, befores, watch=self._programs.watch_of(key))
            if key is not None:
                self.kind = self._programs.judge(key, recordings)
        results, values = [], [recording.values for recording in recordings]
        for state, recording, before, batch in zip(self._states, recordings, befores, batches, strict=True):
            graph.use_device(state.device)
            results.append(state.launch(recording, before, batch))
        graph.use_device(self._states[0].device)
        if not self._is_apart:
            self._kept = (values, results)
        return [self._output(recording.output, self._host_tensors(recording, result, batch))
            for recording, result, batch in zip(recordings, results, batches, strict=True)]

    def _host_tensors(self, recording: Recording, result: Sequence[Any], batch: Batch) -> list[Any]:
        of_batch = [] if all(source.kind != "batch" for source in recording.sources) else self._runtime.of_batch(batch)
        return [of_batch[source.key] if source.kind == "batch" else result[source.key] for source in recording.sources]

    def _output(self, form: StepOutput, tensors: Sequence[Any]) -> StepOutput:
        return StepOutput(tensors=rebuild(form.tensors, iter(tensors)), functions=form.functions,
                          is_update=form.is_update, num_stacked=self._num_stacked or form.num_stacked)

    def _record(self, batches: Sequence[Batch], micro_step: int, befores: list[Before], *, watch: Watch,
                ) -> list[Recording]:
        recordings = []
        with self._enter(), torch.autograd.set_multithreading_enabled(False):
            for state, batch in zip(self._states, batches, strict=True):
                graph.use_device(state.device)
                state.make_readable()
                befores.append(before := Before(state.replica))
                state.note(before)
                seed = graph.get_seed(state.device)
                record_with = functools.partial(
                    record, state.replica, self._step, batch, micro_step, before=before, numbers=self._of_optimizers,
                    memory=self._memory, runtime=self._runtime, inputs_of=state.inputs_of(before, batch),
                    watch=watch if not recordings or watch is Watch.nothing else Watch.device,
                    is_alone=self._is_alone)
                recording = record_with(locate=self._has_read)
                if recording.has_read and self._is_apart and not self._is_alone:
                    before.restore()
                    graph.set_seed(seed, state.device)
                    notes = record_with(watch=Watch.device, locate=True).notes or recording.notes
                    raise CaptureError(f"{self._name} cannot run on several replicas: {notes[0]}. One program serves "
                                       "all of them, and what it reads would be the first replica's.")
                # What has read goes on where it read: on torch_xla's own runtime.
                runtime = OnTorchXla() if recording.has_read else self._runtime
                compile_recording(recording, state.device, runtime)
                graph.set_seed(graph.next_seed(seed), state.device)
                recordings.append(recording)
        self._has_read = recordings[0].has_read
        self._num_reading = self._num_reading + 1 if self._has_read else 0
        if len({recording.graph for recording in recordings}) > 1:
            raise CaptureError(f"the replicas computed different graphs in {self._name}, and would wait for each other "
                               "for ever. model_fn must do the same on every replica: no branch on an ordinal.")
        return recordings

    def _replay(self, program: Program, batches: Sequence[Batch]) -> list[StepOutput]:
        feeds, results, self._newest = [], [], program
        sent = [self._runtime.of_batch(batch) for batch in batches]
        for ordinal, (state, tensors) in enumerate(zip(self._states, sent, strict=True)):
            if program.written:
                state.leave_module()
            feeds.append(program.feed(ordinal, state, tensors, self._of_optimizers))
            state.seed = graph.next_seed(state.seed)
        for state, feed in zip(self._states, feeds, strict=True):
            if self._several:
                graph.use_device(state.device)
            results.append(program.compiled.run(feed) if program.compiled else [])
        if self._several:
            graph.use_device(self._states[0].device)  # where another Trainer's single replica is
        self._of_optimizers.advance()
        # Only now may an old buffer die: its destruction waits for the step that uses it, and so for every replica.
        for state, result in zip(self._states, results, strict=True):
            values = state.values
            for number, value in zip(program.written, result, strict=False):
                values[number] = value
            for number in program.dropped:
                values[number] = None
        if not self._written.issuperset(program.written):
            self._written.update(program.written)
        self._written.update(program.dropped)
        if not self._is_apart:
            self._kept = (feeds, sent, results)
        return [self._output(
            output, [tensors[number] if from_batch else result[number] for from_batch, number in program.sources])
            for output, result, tensors in zip(program.outputs, results, sent, strict=True)]


    def may_run_several(self, num_steps: int) -> bool:
        """Whether so many steps may come before the next audit, as one program."""
        program = self._newest
        return self.kind == "replay" and program is not None and program.may_loop and (
            program.num_replays + num_steps <= program.audit_at)

    def run_several(self, batches: Sequence[Sequence[Batch]], after_each: Callable[[], None],
                    ) -> list[list[StepOutput]] | None:
        """Replays one program for several steps, as a loop on an engine's device; does not wait for it.

        Args:
          batches: for each step that of the single replica.
          after_each: called once a step, after its learning rates were read: it sets those of the next one.

        Returns:
          For each step its output; None where the steps need more than one program, and none was dispatched.
        """
        _, program = self._next(batches[0], 0)
        if program is None or program.num_replays + len(batches) > program.audit_at or (
                loop := program.loop(len(batches), self._runtime)) is None:
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
        state = self._states[0]
        program.num_replays += len(batches)
        self._has_replayed, self.kind = True, "replay"
        state.leave_module()
        sent = [self._runtime.of_batch(parts[0]) for parts in batches]
        results = loop.run(loop.feed(state, sent, numbers))
        for number, value in zip(program.written, results, strict=False):
            state.values[number] = value
        self._written.update(program.written)
        output = program.outputs[0]
        return [[self._output(output, [sent[step][number] if from_batch else OfStep(results[number], step)
                                       for from_batch, number in program.sources])] for step in range(len(batches))]

    def _numbers_of(self, program: Program, batches: Sequence[Sequence[Batch]], after_each: Callable[[], None],
                    ) -> list[tuple[NumberPlan, list[Any]]] | None:
        """Returns the numbers of the optimizers in each of several steps; None where a step needs another program."""
        numbers, others = [], self._others
        for i, parts in enumerate(batches):
            if i and (self._of_optimizers.others() != others or self._next(parts, 0)[1] is not program):
                return None
            numbers.append(self._of_optimizers.prepared())
            self._of_optimizers.advance()
            after_each()
        return numbers
