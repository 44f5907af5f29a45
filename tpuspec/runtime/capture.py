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
from tpuspec.runtime.host_reads import told_read
from tpuspec.runtime.number_plan import NumberPlan, told_difference
from tpuspec.runtime.optimizer_numbers import OptimizerNumbers
from tpuspec.runtime.optimizer_places import follow
from tpuspec.runtime.program import Program, moved_numbers
from tpuspec.runtime.python_state import Memory, Snapshot, changed
from tpuspec.runtime.recording import (
    Before,
    Recording,
    Watch,
    compile_recording,
    differences,
    record,
    undone_on_error,
)
from tpuspec.runtime.replica_state import ReplicaState
from tpuspec.runtime.runtimes import OnTorchXla
from tpuspec.runtime.sent_batch import form_of
from tpuspec.runtime.signature import Signature, read_signature, told_change
from tpuspec.runtime.slots import Slot
from tpuspec.spec.backend import CompiledStep, StepFunction
from tpuspec.spec.engine import OfStep
from tpuspec.spec.results import Batch, StepOutput, rebuild
from tpuspec.spec.user_threads import USER_CODE

logger = logging.getLogger(__name__)

_Key = tuple[int, Hashable, int, int]
"""Micro-step, form of the batch, number of the optimizers' equal counters, number of their plan."""

_Branch = tuple[_Key, tuple[str, ...]]
"""What the step read from the device, besides."""

_Told = tuple[Signature, "Snapshot | None", Hashable]
"""What a program was captured with, for messages; the form of its batch is the last."""

_MAX_TRACES = 4
_MAX_DOUBTFUL_TRACES = 6
_QUIET_CAPTURES = 2
_QUIET_COMPILES = 3
"""Of one form of batch while steps are traced: optimizers make their state in the first one."""
_MAX_PLANS = 8
_MAX_PROGRAMS = 8
"""Of one form of batch: a hook, or what the step reads from the device, may switch between a few."""


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
        self._mode, self._enter, self._fallback, self._num_stacked = mode, enter, fallback, num_stacked
        self._audit_every = audit_every
        self._several = len(replicas) > 1
        self._is_alone = states[0].num_replicas == 1
        self._of_optimizers = OptimizerNumbers(replicas)
        self._plans: dict[tuple[int, Hashable, int], list[NumberPlan]] = {}
        self._counters: dict[tuple[Hashable, ...], int] = {}
        self._counters_now = 0
        self._numbers: dict[Slot, int] = {}
        self._programs: dict[_Key, list[Program]] = {}
        self._trusted: dict[_Key, list[Program]] = {}
        self._crossed: set[_Branch] = set()
        self._traces: dict[_Branch, Recording | None] = {}
        self._read: dict[_Key, set[tuple[str, ...]]] = {}
        self._num_traces = self._num_doubtful = self._num_captures = 0
        self._user_code = -1
        self._others: list[Any] = []
        self._changes: dict[int, list[_Told]] = {}
        self._captured: list[_Told] = []
        self._in_flight = self._has_replayed = self._has_read = False
        self._num_reading = 0  # traces in a row: optimizers may read while they make their state
        self._written: set[int] = set()
        self._newest: Program | None = None
        self._memory = Memory(step, replicas[0])
        self._settings: Snapshot | None = None
        # What the newest step reads and writes. A thread of torch_xla that is the last to hold a buffer waits for the
        # step, and so for all replicas, perhaps with the launch of one of them in its hands: Eigen takes the next
        # task before it destroys the one before. The launches of the next step wait until these threads have let go.
        self._kept: Any = None
        self._gave_up = mode is CaptureMode.off
        self._reason = "capture=auto would say why"
        self._seconds = 0.0
        self._num_compiles: dict[Hashable, int] = {}

    def __call__(self, batches: Sequence[Batch], micro_step: int = 0) -> list[StepOutput]:
        """Dispatches one step on each replica's batch; does not wait for it."""
        if self._gave_up:
            return self._trace(batches, micro_step, None)
        key, program = self._next(batches, micro_step)
        if program is None or (program.num_replays >= program.audit_at and micro_step == 0):
            self.publish()
            return self._trace(batches, micro_step, key)
        program.num_replays += 1
        self._has_replayed = True
        self.kind = "replay"
        return self._replay(program, batches)

    def _next(self, batches: Sequence[Batch], micro_step: int) -> tuple[_Key, Program | None]:
        """Prepares the next step; returns its key, and the program that may be replayed for it."""
        if (others := self._of_optimizers.others()) != self._others:
            self.publish()  # a schedule has moved what is no number
            self._trusted.clear()
            self._crossed.update(self._traces)
            self._others = others
        if not self._in_flight:
            self._adopt()
        of_plans = (micro_step, form_of(batches[0]), self._counters_now)
        key = (*of_plans, self._prepared(self._plans.get(of_plans, ())))
        program = next((program for program in self._trusted.get(key, ())
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
                self._check_settings()
        if self._states[0].holder in (None, self):
            self._make_readable()

    def _make_readable(self) -> None:
        for state in self._states:
            state.make_readable()

    def _prepared(self, plans: Sequence[NumberPlan]) -> int:
        """Prepares the optimizers' numbers by the first plan that serves; returns its place, or that of a new one."""
        return next((i for i, plan in enumerate(plans) if self._of_optimizers.prepare(plan)), len(plans))

    def _check_settings(self) -> None:
        """Checks that no value that the step reads changed while nothing looked.

        Raises:
          CaptureError: the input or a host function has changed one.
        """
        settings = self._memory.settings()
        if moved := changed(self._settings or {}, settings):
            self._settings = settings
            raise CaptureError(
                f"{self._name}: a Python value that the step reads changed, {moved[0]}, between two steps of a loop, "
                "and the steps since then may have used the old value. Pass what changes from step to step in the "
                "batch, change it in a hook, or set capture=off.")

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
            self._trusted.clear()
            self._crossed.update(self._traces)
            self._settings = None

    def _follow_first_replica(self) -> None:
        """Gives what a hook or a schedule set on the first replica to the others."""
        for replica in self._replicas[1:]:
            follow(replica, self._replicas[0])

    def _trace(self, batches: Sequence[Batch], micro_step: int, key: _Key | None) -> list[StepOutput]:
        """Runs a step by tracing it; makes it a program if that is safe; says what it costs if it is compiled anew."""
        begun, num_compiles = time.perf_counter(), self._runtime.num_compiles()
        outputs = self._run_traced(batches, micro_step, key)
        if self._runtime.num_compiles() == num_compiles:
            self._seconds = time.perf_counter() - begun
        elif self._gave_up:
            form = (micro_step, form_of(batches[0]))
            self._num_compiles[form] = num = self._num_compiles.get(form, 0) + 1
            if num == _QUIET_COMPILES + 1:
                logger.warning("%s is compiled anew time and again, by now %d times for one form of batch; the newest "
                               "took %.2g s: %s.", self._name, num, time.perf_counter() - begun, self._reason)
        return outputs

    def _run_traced(self, batches: Sequence[Batch], micro_step: int, key: _Key | None) -> list[StepOutput]:
        self.kind = "traced"
        if self._fallback is not None and self._gave_up and (self._num_reading > 1 or not self._is_apart):
            self._make_readable()
            return self._fallback(batches, micro_step)
        if (holder := self._states[0].holder) not in (None, self):
            holder.publish()
        befores: list[Before] = []
        self._follow_first_replica()  # the schedule has moved on since the loop began
        self._of_optimizers.settle()
        with undone_on_error(befores):
            recordings = self._record(batches, micro_step, befores, watch=self._watch_of(key))
            if key is not None:
                self._judge(key, recordings)
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

    def _watch_of(self, key: _Key | None) -> Watch:
        """A step that may be one of the programs is only held against them, which is quicker."""
        if key is None:
            return Watch.nothing
        is_known = self._programs.get(key) and all(one != key for one, _ in self._traces)
        return Watch.device if is_known else Watch.all

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

    def _judge(self, key: _Key, recordings: Sequence[Recording]) -> None:
        """Audits a trusted program, trusts one that the trace equals, or makes a new one."""
        if not self._keep_plan(key, recordings[0]):
            return
        branch = (key, recordings[0].answers)
        for program in self._trusted.get(key, ()):
            if program.recording.answers == branch[1]:
                self._audit(branch, program, recordings[0])
                self.kind = "replay"
                return
        if self._settings is None or recordings[0].is_watched:
            self._settings = self._memory.settings()
        programs = self._programs.get(key, [])
        if branch not in self._traces and not recordings[0].notes:
            for program in programs:
                if not differences(program.recording, recordings[0], self._replicas[0]):
                    programs.remove(program)
                    programs.append(program)  # the newest stay
                    self.kind = "replay" if program.num_replays or program.num_checked else "traced"
                    self._trust(key, program)
                    return
        if programs and recordings[0].plan != self._plans[key[:3]][key[3]]:
            self._trusted.pop(key, None)  # the optimizers compute with other numbers from now on
            del self._programs[key]
            self._plans[key[:3]][key[3]] = recordings[0].plan
        if recordings[0].is_watched:
            self._consider(branch, recordings)
        else:
            self._traces[branch] = None  # the next ones are watched

    def _keep_plan(self, key: _Key, recording: Recording) -> bool:
        """Keeps how the optimizers compute numbers; returns whether that is not another way in each step."""
        plans = self._plans.setdefault(key[:3], [])
        if key[3] == len(plans):
            plans.append(recording.plan)
        elif not self._programs.get(key):
            plans[key[3]] = recording.plan
        if len(plans) > _MAX_PLANS:
            self._give_up([told_difference(*plans[-2:]) or "its optimizers compute with other numbers in each step"])
        return not self._gave_up

    def _trust(self, key: _Key, program: Program) -> None:
        program.num_checked += program.num_replays
        program.num_replays = 0
        self._trusted.setdefault(key, []).insert(0, program)
        self._num_traces = 0
        self._changes.pop(key[0], None)

    def _consider(self, branch: _Branch, recordings: Sequence[Recording]) -> None:
        """Makes a program of a step whose two newest traces are equal; gives up after too many that are not."""
        key, answers = branch
        newest, previous = recordings[0], self._traces.get(branch)
        # What user code did between the two is no reason to give up.
        if branch in self._crossed and (previous is None or previous.notes or differences(
                previous, newest, self._replicas[0])):
            previous = None
        self._crossed.discard(branch)
        if newest.is_doubtful and self._num_doubtful < _MAX_DOUBTFUL_TRACES:
            self._num_doubtful += 1  # traced again, until no other thread runs beside it
            return
        read = self._read.setdefault(key, set())
        read.add(answers)
        if len(read) > _MAX_TRACES:
            self._give_up([told_read(newest.guards[-1].place if newest.guards else "some place")])
            return
        signature = (read_signature(self._replicas[0]), self._settings, key[1])
        if previous is None and len(read) == 1:
            changes = self._changes.setdefault(key[0], [])
            changes.append(signature)
            if len(changes) > _MAX_TRACES:
                old, new = changes[-2:]
                self._give_up([_told_change(old, new) or "it is another one in each step"])
                return
        self._traces[branch] = newest
        reasons = list(newest.notes)
        if previous is not None:
            reasons += [] if previous.notes else differences(previous, newest, self._replicas[0])
            if not reasons and not previous.notes:
                constants = [self._runtime.take(recording.constants) for recording in recordings]
                program = Program.of(recordings, constants, previous, self._numbers)
                self._keep(key, program)
                self._traces = {one: trace for one, trace in self._traces.items() if one[0] != key}
                self._trust(key, program)
                self._tell_of_recompiles(key, signature)
                return
        self._num_traces += bool(reasons)
        if self._num_traces >= _MAX_TRACES - 1 and reasons:
            self._give_up(reasons)

    def _keep(self, key: _Key, program: Program) -> None:
        """Adds a program; the oldest go where there are too many, as their constants are kept too."""
        programs = self._programs.setdefault(key, [])
        programs.append(program)
        del programs[:-_MAX_PROGRAMS]
        self._trusted[key] = [one for one in self._trusted.get(key, ()) if one in programs]

    def _give_up(self, reasons: Sequence[str]) -> None:
        told = f"{self._name} cannot be captured and replayed: {reasons[0]}."
        if self._mode is CaptureMode.require:
            raise CaptureError(f"{told} Mend that, or set capture=auto to trace every step.")
        cost = f" (the newest trace took {self._seconds:.2g} s)" if self._seconds else ""
        logger.warning("%s Every step is traced instead, which is right but slower%s. capture=off asks for that.",
                       told, cost)
        self._gave_up, self._reason = True, reasons[0]
        self._programs.clear()
        self._trusted.clear()
        self._traces.clear()

    def _tell_of_recompiles(self, key: _Key, signature: _Told) -> None:
        if key[0]:
            return
        self._captured.append(signature)
        del self._captured[:-2]
        self._num_captures += 1
        if self._num_captures > _QUIET_CAPTURES:
            logger.warning("%s was captured %d times: %s.", self._name, self._num_captures,
                           _told_change(*self._captured) or "its Python code does something else")

    def _audit(self, branch: _Branch, program: Program, recording: Recording) -> None:
        key = branch[0]
        program.num_checked += program.num_replays
        program.audit_at = min(program.num_checked, self._audit_every)
        num_replays, program.num_replays = program.num_replays, 0
        if recording.is_doubtful:
            return
        found = recording.notes or differences(program.recording, recording, self._replicas[0])
        moved = moved_numbers(program.known, recording)
        if not found:
            for leaf in moved:  # in the plan it is, then
                del program.known[leaf]
        elif moved and not recording.notes:  # which the graph does not follow: another program
            del self._programs[key], self._trusted[key]
            self._plans[key[:3]][key[3]] = recording.plan
            self._traces[branch] = recording if recording.is_watched else None
            self._num_traces += 1
        else:
            raise CaptureError(
                f"{self._name} is no longer what was captured: {found[0]}. It was replayed {num_replays} times since "
                "the last check. Mend that, or set capture=off.")

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


def _told_change(old: _Told, new: _Told) -> str | None:
    """Says what changed between two captures; None where that is not known."""
    if (change := told_change(old[0], new[0])) is not None:
        return change
    if moved := changed(old[1] or {}, new[1] or {}):
        return f"a Python value that the step reads changed, {moved[0]}"
    return None if old[2] == new[2] else f"the batch changed, {old[2]} -> {new[2]}"
