"""The programs of a step: what becomes one, which are trusted to stand for the step, and what their audits find."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence

from tpuspec.config import CaptureMode
from tpuspec.errors import CaptureError
from tpuspec.spec.backend import Replica
from tpuspec.tracer.differences import differences
from tpuspec.tracer.host_reads import told_read
from tpuspec.tracer.number_plan import NumberPlan, told_difference
from tpuspec.tracer.on_engine import OnEngine
from tpuspec.tracer.program import Program, moved_numbers
from tpuspec.tracer.python_state import Memory, Snapshot, changed
from tpuspec.tracer.recording import Recording, Watch
from tpuspec.tracer.signature import StateForm, read_signature, told_change
from tpuspec.tracer.slots import Slot

logger = logging.getLogger(__name__)

Key = tuple[int, Hashable, int, int]
"""Micro-step, form of the batch, number of the optimizers' equal counters, number of their plan."""

_Branch = tuple[Key, tuple[str, ...]]
"""What the step read from the device, besides."""

_Told = tuple[StateForm, "Snapshot | None", Hashable]
"""What a program was captured with, for messages; the form of its batch is the last."""

_MAX_TRACES = 4
_MAX_DOUBTFUL_TRACES = 6
_QUIET_CAPTURES = 2
_MAX_PLANS = 8
_MAX_PROGRAMS = 8
"""Of one form of batch: a hook, or what the step reads from the device, may switch between a few."""


class KeptPrograms:
    """The programs of one step.

    Args:
      name: of the step in messages.
      replica: tells what changed.
      memory: of the step's Python code.
      runtime: has the programs' constants.
      mode: `require` raises where a step cannot be captured.
      audit_every: replays between two traces that check that the step is still what was captured.

    Attributes:
      plans: micro-step, form of the batch and equal counters -> how the optimizers compute numbers.
      kept: the programs; the newest last.
      trusted: those of them that may stand for the step now; the newest first.
      numbers: of the slots.
      gave_up: whether every step is traced from now on.
      reason: why steps are traced.
      seconds: that the newest trace took which compiled nothing.
    """

    def __init__(self, name: str, replica: Replica, memory: Memory, runtime: OnEngine, *, mode: CaptureMode,
                 audit_every: int) -> None:
        self._name, self._replica, self._memory, self._runtime = name, replica, memory, runtime
        self._mode, self._audit_every = mode, audit_every
        self.plans: dict[tuple[int, Hashable, int], list[NumberPlan]] = {}
        self.trusted: dict[Key, list[Program]] = {}
        self.numbers: dict[Slot, int] = {}
        self.gave_up = mode is CaptureMode.off
        self.reason = "capture=auto would say why"
        self.seconds = 0.0
        self.kept: dict[Key, list[Program]] = {}
        self._crossed: set[_Branch] = set()
        self._traces: dict[_Branch, Recording | None] = {}
        self._read: dict[Key, set[tuple[str, ...]]] = {}
        self._num_traces = self._num_doubtful = self._num_captures = 0
        self._changes: dict[int, list[_Told]] = {}
        self._captured: list[_Told] = []
        self._settings: Snapshot | None = None

    def doubt(self) -> None:
        """Trusts no program until a new trace equals it: user code ran, or a schedule moved what is no number."""
        self.trusted.clear()
        self._crossed.update(self._traces)

    def forget_settings(self) -> None:
        """Lets the next trace say which Python values the step reads."""
        self._settings = None

    def check_settings(self) -> None:
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

    def watch_of(self, key: Key | None) -> Watch:
        """A step that may be one of the programs is only held against them, which is quicker."""
        if key is None:
            return Watch.nothing
        is_known = self.kept.get(key) and all(one != key for one, _ in self._traces)
        return Watch.device if is_known else Watch.all

    def judge(self, key: Key, recording: Recording) -> str:
        """Audits a trusted program, trusts one that the trace equals, or makes a new one.

        Returns:
          What the step counts as: 'replay' where it was the check of a program that is replayed, else 'traced'.

        Raises:
          CaptureError: the step is no longer what was captured, or `require` asks for a program that cannot be.
        """
        if not self._keep_plan(key, recording):
            return "traced"
        branch = (key, recording.answers)
        for program in self.trusted.get(key, ()):
            if program.recording.answers == branch[1]:
                self._audit(branch, program, recording)
                return "replay"
        if self._settings is None or recording.is_watched:
            self._settings = self._memory.settings()
        programs = self.kept.get(key, [])
        if branch not in self._traces and not recording.notes:
            for program in programs:
                if not differences(program.recording, recording, self._replica):
                    programs.remove(program)
                    programs.append(program)  # the newest stay
                    was_replayed = program.num_replays or program.num_checked
                    self._trust(key, program)
                    return "replay" if was_replayed else "traced"
        if programs and recording.plan != self.plans[key[:3]][key[3]]:
            self.trusted.pop(key, None)  # the optimizers compute with other numbers from now on
            del self.kept[key]
            self.plans[key[:3]][key[3]] = recording.plan
        if recording.is_watched:
            self._consider(branch, recording)
        else:
            self._traces[branch] = None  # the next ones are watched
        return "traced"

    def _keep_plan(self, key: Key, recording: Recording) -> bool:
        """Keeps how the optimizers compute numbers; returns whether that is not another way in each step."""
        plans = self.plans.setdefault(key[:3], [])
        if key[3] == len(plans):
            plans.append(recording.plan)
        elif not self.kept.get(key):
            plans[key[3]] = recording.plan
        if len(plans) > _MAX_PLANS:
            self._give_up([told_difference(*plans[-2:]) or "its optimizers compute with other numbers in each step"])
        return not self.gave_up

    def _trust(self, key: Key, program: Program) -> None:
        program.num_checked += program.num_replays
        program.num_replays = 0
        self.trusted.setdefault(key, []).insert(0, program)
        self._num_traces = 0
        self._changes.pop(key[0], None)

    def _consider(self, branch: _Branch, newest: Recording) -> None:
        """Makes a program of a step whose two newest traces are equal; gives up after too many that are not."""
        key, answers = branch
        previous = self._traces.get(branch)
        # What user code did between the two is no reason to give up.
        if branch in self._crossed and (previous is None or previous.notes or differences(
                previous, newest, self._replica)):
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
        signature = (read_signature(self._replica), self._settings, key[1])
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
            reasons += [] if previous.notes else differences(previous, newest, self._replica)
            if not reasons and not previous.notes:
                program = Program.of(newest, self._runtime.take(newest.constants), previous, self.numbers)
                self._keep(key, program)
                self._traces = {one: trace for one, trace in self._traces.items() if one[0] != key}
                self._trust(key, program)
                self._tell_of_recompiles(key, signature)
                return
        self._num_traces += bool(reasons)
        if self._num_traces >= _MAX_TRACES - 1 and reasons:
            self._give_up(reasons)

    def _keep(self, key: Key, program: Program) -> None:
        """Adds a program; the oldest go where there are too many, as their constants are kept too."""
        programs = self.kept.setdefault(key, [])
        programs.append(program)
        del programs[:-_MAX_PROGRAMS]
        self.trusted[key] = [one for one in self.trusted.get(key, ()) if one in programs]

    def _give_up(self, reasons: Sequence[str]) -> None:
        told = f"{self._name} cannot be captured and replayed: {reasons[0]}."
        if self._mode is CaptureMode.require:
            raise CaptureError(f"{told} Mend that, or set capture=auto to trace every step.")
        cost = f" (the newest trace took {self.seconds:.2g} s)" if self.seconds else ""
        logger.warning("%s Every step is traced instead, which is right but slower%s. capture=off asks for that.",
                       told, cost)
        self.gave_up, self.reason = True, reasons[0]
        self.kept.clear()
        self.trusted.clear()
        self._traces.clear()

    def _tell_of_recompiles(self, key: Key, signature: _Told) -> None:
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
        found = recording.notes or differences(program.recording, recording, self._replica)
        moved = moved_numbers(program.known, recording)
        if not found:
            for leaf in moved:  # in the plan it is, then
                del program.known[leaf]
        elif moved and not recording.notes:  # which the graph does not follow: another program
            del self.kept[key], self.trusted[key]
            self.plans[key[:3]][key[3]] = recording.plan
            self._traces[branch] = recording if recording.is_watched else None
            self._num_traces += 1
        else:
            raise CaptureError(
                f"{self._name} is no longer what was captured: {found[0]}. It was replayed {num_replays} times since "
                "the last check. Mend that, or set capture=off.")


def _told_change(old: _Told, new: _Told) -> str | None:
    """Says what changed between two captures; None where that is not known."""
    if (change := told_change(old[0], new[0])) is not None:
        return change
    if moved := changed(old[1] or {}, new[1] or {}):
        return f"a Python value that the step reads changed, {moved[0]}"
    return None if old[2] == new[2] else f"the batch changed, {old[2]} -> {new[2]}"
