"""The captured step: traced until two traces are equal, then replayed without running Python code.

Inside a loop the newest state lives in `ReplicaState.values`; the modules and optimizers hold it again after
`publish`. All replicas are driven by one thread: each traces and compiles in turn, which runs nothing, and only then is
each launched, so that an error in one replica's trace is that error and nothing waits for a peer that never comes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tpuspec.config import CaptureMode
from tpuspec.errors import CaptureError
from tpuspec.runtime import graph
from tpuspec.runtime.number_plan import NumberPlan, told_difference
from tpuspec.runtime.optimizer_numbers import OptimizerNumbers
from tpuspec.runtime.python_state import HostCode
from tpuspec.runtime.recording import (
    Before,
    Recording,
    compile_recording,
    differences,
    launch,
    record,
    undone_on_error,
)
from tpuspec.runtime.replica_state import ReplicaState
from tpuspec.runtime.sent_batch import form_of
from tpuspec.runtime.signature import Signature, read_settings, read_signature, told_change
from tpuspec.runtime.slots import Slot
from tpuspec.runtime.traced_numbers import Leaf
from tpuspec.spec.backend import CompiledStep, Replica, StepFunction
from tpuspec.spec.results import Batch, StepOutput, rebuild

logger = logging.getLogger(__name__)

_Key = tuple[int, int, Hashable, int]
"""Number of the signature, micro-step, form of the batch, number of the optimizers' plan."""

_MAX_TRACES = 4
_MAX_DOUBTFUL_TRACES = 6
_QUIET_CAPTURES = 2
_MAX_PLANS = 8


@dataclass(slots=True)
class _Program:
    """A captured step, ready to be replayed on every replica.

    Attributes:
      graph: its hash.
      templates: for each replica the graph's inputs, with its constants in their places.
      slots, batch, numbers: (place among the inputs, number of the slot, batch tensor or optimizers' number).
      seed: (place, number of the step in the program) of the random seeds.
      written: numbers of the slots that the first outputs are.
      dropped: numbers of the gradients that are gone afterwards.
      sources: (from the batch, number) of each tensor for the host.
      outputs: for each replica the output of the trace, whose functions and form stay.
      recording: the first replica's, to hold later traces against.
      known: numbers of optimizers that were the same in both traces: whether the graph follows them is not known.
      num_replays: since the last audit.
    """

    graph: bytes
    templates: list[list[Any]]
    slots: list[tuple[int, int]]
    batch: list[tuple[int, int]]
    numbers: list[tuple[int, int]]
    seed: list[tuple[int, int]]
    written: list[int]
    dropped: list[int]
    sources: list[tuple[bool, int]]
    outputs: list[StepOutput]
    recording: Recording
    known: dict[Leaf, Any]
    num_replays: int = 0


class CapturedStep:
    """A step over the local replicas that is captured as soon as it may be; see `spec.backend.CompiledStep`.

    Args:
      step: the step of one replica.
      replicas: the local replicas, equal in state.
      mode: `off` traces every step anew, `require` raises where a step cannot be captured.
      audit_every: replays between two traces that check that the step is still what was captured.
      enter: makes the backend the one that steps reduce with; a context manager for each trace.
      name: of the step in messages.
      host_code: of the backend's host functions in all modes.
      fallback: runs a step that is traced for good; None records and launches each.
      numbers: of the optimizers.
      num_steps: training steps that `step` makes.

    Attributes:
      kind: how the newest step ran, 'replay' or 'traced'.
    """

    def __init__(self, step: StepFunction, replicas: Sequence[Replica], *, mode: CaptureMode, audit_every: int,
                 enter: Callable[[], Any], name: str, host_code: HostCode,
                 fallback: CompiledStep | None = None, numbers: OptimizerNumbers | None = None,
                 num_steps: int = 1) -> None:
        self.kind = "traced"
        self._step, self._replicas, self._name = step, tuple(replicas), name
        self._mode, self._enter, self._fallback = mode, enter, fallback
        self._num_steps, self._audit_every = num_steps, max(1, audit_every // num_steps)
        self._states = [ReplicaState(replica) for replica in replicas]
        self._several = len(replicas) > 1
        self._of_optimizers = numbers or OptimizerNumbers(replicas)
        self._plans: dict[tuple[int, int, Hashable], list[NumberPlan]] = {}
        self._numbers: dict[Slot, int] = {}
        self._programs: dict[_Key, _Program] = {}
        self._traces: dict[_Key, Recording] = {}
        self._num_traces = self._num_doubtful = 0
        self._signature = 0
        self._signatures: dict[Signature, int] = {}
        self._read: list[Signature] = []
        self._others: list[Any] = []
        self._captured: dict[tuple[int, Hashable], None] = {}
        self._in_flight = False
        self._written: set[int] = set()
        self._host_code, self._knows_host_code = host_code, False
        # What the newest step reads and writes. A thread of torch_xla that is the last to hold a buffer waits for the
        # step, and so for all replicas, perhaps with the launch of one of them in its hands: Eigen takes the next
        # task before it destroys the one before. The launches of the next step wait until these threads have let go.
        self._kept: Any = None
        self._gave_up = mode is CaptureMode.off

    def __call__(self, batches: Sequence[Batch], micro_step: int = 0) -> list[StepOutput]:
        """Dispatches one step on each replica's batch; does not wait for it."""
        if self._gave_up:
            return self._trace(batches, micro_step, None)
        if not self._knows_host_code:  # of which the first trace tells
            return self._trace(batches, micro_step, None)
        if self._in_flight and self._others and self._of_optimizers.others() != self._others:
            self.publish()  # a schedule has moved what is no number
        if not self._in_flight:
            self._adopt()
        of_plans = (self._signature, micro_step, form_of(batches[0]))
        key = (*of_plans, self._prepared(self._plans.get(of_plans, ())))
        program = self._programs.get(key)
        if program is None or (program.num_replays >= self._audit_every and micro_step == 0) or (
                not self._of_optimizers.are(program.known)):
            self.publish()
            return self._trace(batches, micro_step, key)
        program.num_replays += 1
        self.kind = "replay"
        return self._replay(program, batches)

    @property
    def has_given_up(self) -> bool:
        """Whether every step is traced from now on."""
        return self._gave_up

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
            self._check_settings()

    def _prepared(self, plans: Sequence[NumberPlan]) -> int:
        """Prepares the optimizers' numbers by the first plan that serves; returns its place, or that of a new one."""
        return next((i for i, plan in enumerate(plans) if self._of_optimizers.prepare(plan)), len(plans))

    def _check_settings(self) -> None:
        """Checks that no value that the step reads changed while nothing looked."""
        signature = self._read[self._signature]
        settings = read_settings(self._step, self._replicas[0], self._host_code)
        if change := told_change(signature, signature._replace(settings=settings)):
            raise CaptureError(
                f"{self._name}: {change}, between two steps of a loop, and the steps since then may have used the old "
                "value. Pass what changes from step to step in the batch, change it in a hook, or set capture=off.")

    def _adopt(self) -> None:
        self._follow_first_replica()
        self._of_optimizers.settle()
        for state in self._states:
            state.adopt(self._numbers)
        for state in self._states:
            state.values += [None] * (len(self._numbers) - len(state.values))
        self._in_flight = True
        self._others = self._of_optimizers.others()
        signature = read_signature(self._step, self._replicas[0], self._of_optimizers.adopt(), self._host_code)
        self._signature = self._signatures.setdefault(signature, len(self._signatures))
        if self._signature == len(self._read):
            self._read.append(signature)

    def _follow_first_replica(self) -> None:
        """Gives hyper-parameters that a hook set on the first replica to the others."""
        for replica in self._replicas[1:]:
            for name, optimizer in replica.optimizers.items():
                for own, first in zip(
                        optimizer.param_groups, self._replicas[0].optimizers[name].param_groups, strict=True):
                    own.update({key: value for key, value in first.items()
                                if key != "params" and not isinstance(value, Tensor)})

    def _trace(self, batches: Sequence[Batch], micro_step: int, key: _Key | None) -> list[StepOutput]:
        """Runs a step by tracing it; makes it a program if that is safe."""
        self.kind = "traced"
        if self._fallback is not None and self._gave_up:
            return self._fallback(batches, micro_step)
        befores: list[Before] = []
        self._of_optimizers.settle()
        with undone_on_error(befores):
            recordings = self._record(batches, micro_step, befores, watch=key is not None)
            if key is not None:
                self._keep_plan(key, recordings[0])
            program = self._programs.get(key) if key is not None else None
            if program is not None and key is not None:
                self._audit(key, program, recordings[0])
            elif key is not None:
                self._consider(key, recordings)
        results, values = [], [recording.values for recording in recordings]
        for state, recording in zip(self._states, recordings, strict=True):
            graph.use_device(state.device)
            results.append(launch(recording))
        graph.use_device(self._states[0].device)
        self._kept = (values, results)
        return [replace(recording.output, tensors=rebuild(recording.output.tensors, iter(
            _host_tensors(recording, result, batch))))
            for recording, result, batch in zip(recordings, results, batches, strict=True)]

    def _record(self, batches: Sequence[Batch], micro_step: int, befores: list[Before], *, watch: bool,
                ) -> list[Recording]:
        recordings = []
        with self._enter(), torch.autograd.set_multithreading_enabled(False):
            for state, batch in zip(self._states, batches, strict=True):
                graph.use_device(state.device)
                befores.append(before := Before(state.replica))
                seed = graph.get_seed(state.device)
                recording = record(state.replica, self._step, batch, micro_step, before=before,
                                   numbers=self._of_optimizers, host_code=self._host_code, watch=watch,
                                   num_steps=self._num_steps)
                compile_recording(recording, state.device)
                graph.set_seed(graph.seed_after(seed, self._num_steps), state.device)
                recordings.append(recording)
        self._knows_host_code = True
        if len({recording.graph for recording in recordings}) > 1:
            raise CaptureError(f"the replicas computed different graphs in {self._name}, and would wait for each other "
                               "for ever. model_fn must do the same on every replica: no branch on an ordinal.")
        return recordings

    def _keep_plan(self, key: _Key, recording: Recording) -> None:
        plans = self._plans.setdefault(key[:3], [])
        if key[3] == len(plans):
            plans.append(recording.plan)
        elif key not in self._programs:
            plans[key[3]] = recording.plan
        if len(plans) > _MAX_PLANS:
            self._give_up([told_difference(*plans[-2:]) or "its optimizers compute with other numbers in each step"])

    def _consider(self, key: _Key, recordings: Sequence[Recording]) -> None:
        """Makes a program of a step whose two newest traces are equal; gives up after too many that are not."""
        if self._gave_up:
            return
        newest, previous = recordings[0], self._traces.get(key)
        if newest.is_doubtful and self._num_doubtful < _MAX_DOUBTFUL_TRACES:
            self._num_doubtful += 1  # traced again, until no other thread runs beside it
            return
        if previous is None and self._num_new_signatures() >= _MAX_TRACES:
            self._give_up([told_change(*self._read[-2:]) or "it is another one in each step"])
            return
        self._traces[key] = newest
        reasons = list(newest.notes)
        if previous is not None:
            reasons += [] if previous.notes else differences(previous, newest, self._replicas[0])
            if not reasons and not previous.notes:
                self._programs[key] = self._program(recordings, previous)
                del self._traces[key]
                self._num_traces = 0
                self._tell_of_recompiles(key)
                return
        self._num_traces += bool(reasons)
        if self._num_traces >= _MAX_TRACES - 1 and reasons:
            self._give_up(reasons)

    def _num_new_signatures(self) -> int:
        """Counts the newest signatures, of which none has a program."""
        known = {key[0] for key in self._programs}
        return next((count for count, number in enumerate(reversed(range(len(self._read)))) if number in known),
                    len(self._read))

    def _give_up(self, reasons: Sequence[str]) -> None:
        told = f"{self._name} cannot be captured and replayed: {reasons[0]}."
        if self._mode is CaptureMode.require:
            raise CaptureError(f"{told} Mend that, or set capture=auto to trace every step.")
        instead = "They run one at a time" if self._num_steps > 1 else "Every step is traced"
        logger.warning("%s %s instead, which is right but slower. capture=off asks for that.", told, instead)
        self._gave_up = True
        self._programs.clear()
        self._traces.clear()

    def _tell_of_recompiles(self, key: _Key) -> None:
        signature, micro_step, form, _ = key
        if micro_step or (signature, form) in self._captured:
            return
        self._captured[(signature, form)] = None
        if len(self._captured) > _QUIET_CAPTURES:
            (old, old_form), (new, new_form) = list(self._captured)[-2:]
            logger.warning("%s was captured %d times: %s.", self._name, len(self._captured),
                           told_change(self._read[old], self._read[new])
                           or f"the batch changed, {old_form} -> {new_form}")

    def _audit(self, key: _Key, program: _Program, recording: Recording) -> None:
        program.num_replays = 0
        if recording.is_doubtful:
            return
        found = recording.notes or differences(program.recording, recording, self._replicas[0])
        moved = _moved(program.known, recording)
        if not found:
            for leaf in moved:  # in the plan it is, then
                del program.known[leaf]
        elif moved and not recording.notes:  # which the graph does not follow: another program
            del self._programs[key]
            self._plans[key[:3]][key[3]] = recording.plan
            self._traces[key] = recording
            self._num_traces += 1
            return
        if found:
            raise CaptureError(
                f"{self._name} is no longer what was captured and replayed {self._audit_every} times: {found[0]}. "
                "The steps since the last check used the captured form. Mend that, or set capture=off.")

    def _program(self, recordings: Sequence[Recording], previous: Recording) -> _Program:
        first = recordings[0]
        for slot in first.slots:
            self._numbers.setdefault(slot, len(self._numbers))
        places: dict[str, list[tuple[int, Any]]] = {}
        for place, source in enumerate(first.inputs):
            places.setdefault(source.kind, []).append((place, source.key))
        templates = []
        for recording in recordings:
            template: list[Any] = [None] * len(recording.inputs)
            for place, number in places.get("constant", []):
                template[place] = recording.constants[number]
            templates.append(template)
        return _Program(
            graph=first.graph, templates=templates,
            slots=[(place, self._numbers[slot]) for place, slot in places.get("slot", [])],
            batch=places.get("batch", []), numbers=places.get("number", []),
            seed=places.get("seed", []),
            written=[self._numbers[slot] for slot in first.written],
            dropped=[self._numbers[slot] for slot in first.dropped if slot in self._numbers],
            sources=[(source.kind == "batch", source.key) for source in first.sources],
            outputs=[recording.output for recording in recordings], recording=first,
            known={leaf: value for leaf, value in first.leaves.items()
                   if leaf not in _moved(previous.leaves, first)})

    def _replay(self, program: _Program, batches: Sequence[Batch]) -> list[StepOutput]:
        feeds, results = [], []
        sent = [batch.tensors() for batch in batches]
        for state, template, tensors in zip(self._states, program.templates, sent, strict=True):
            values, feed = state.values, template.copy()
            for place, number in program.slots:
                feed[place] = values[number]
            for place, number in program.batch:
                feed[place] = tensors[number]
            if program.numbers:
                numbers = self._of_optimizers.sent(state.replica)
                for place, number in program.numbers:
                    feed[place] = numbers[number]
            for place, number in program.seed:
                feed[place] = graph.seed_value(graph.seed_after(state.seed, number), state.device)
            state.seed = graph.seed_after(state.seed, self._num_steps)
            feeds.append(feed)
        for state, feed in zip(self._states, feeds, strict=True):
            if self._several:
                graph.use_device(state.device)
            results.append(graph.run(program.graph, feed) if program.graph else [])
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
        self._kept = (feeds, sent, results)
        return [StepOutput(tensors=rebuild(output.tensors, iter(
            [tensors[number] if from_batch else result[number] for from_batch, number in program.sources])),
            functions=output.functions, is_update=output.is_update, num_stacked=output.num_stacked)
            for output, result, tensors in zip(program.outputs, results, sent, strict=True)]


def _moved(leaves: Mapping[Leaf, Any], recording: Recording) -> list[Leaf]:
    """Returns the numbers of optimizers that are others in a recording."""
    return [leaf for leaf, value in leaves.items() if recording.leaves.get(leaf) != value]


def _host_tensors(recording: Recording, result: Sequence[Tensor], batch: Batch) -> list[Tensor]:
    tensors = batch.tensors()
    return [tensors[source.key] if source.kind == "batch" else result[source.key] for source in recording.sources]
