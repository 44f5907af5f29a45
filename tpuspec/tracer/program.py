"""A captured step as a program: what it is fed with, what it writes, and when it stands for the step."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from tpuspec.spec.engine import Engine, Run
from tpuspec.spec.results import StepOutput
from tpuspec.tracer import graph
from tpuspec.tracer.guards import Guard
from tpuspec.tracer.number_plan import NumberPlan
from tpuspec.tracer.on_engine import CompiledGraph
from tpuspec.tracer.optimizer_numbers import OptimizerNumbers
from tpuspec.tracer.recording import Recording
from tpuspec.tracer.replica_state import ReplicaState
from tpuspec.tracer.sent_batch import SentBatch
from tpuspec.tracer.slots import Slot
from tpuspec.tracer.traced_numbers import Leaf


@dataclass(slots=True, eq=False)
class Program:
    """A captured step, ready to be replayed.

    Attributes:
      compiled: its graph; None where there is nothing to compute.
      template: the graph's inputs, with its constants in their places.
      slots, batch, numbers: (place among the inputs, number of the slot, batch tensor or optimizers' number).
      seed: (place, draws before) of the random seeds.
      written: numbers of the slots that the first outputs are.
      dropped: numbers of the gradients that are gone afterwards.
      sources: (from the batch, number) of each tensor for the host.
      guards: what the step read from the device.
      output: of the trace, whose functions and form stay.
      recording: to hold later traces against.
      known: numbers of optimizers that were the same in both traces: whether the graph follows them is not known.
      num_replays: since the last audit.
      num_checked: replays before the last trace that it was held against.
      audit_at: replays from one audit to the next: 2, and as many as before, up to the setting.
    """

    compiled: CompiledGraph | None
    template: list[Any]
    slots: list[tuple[int, int]]
    batch: list[tuple[int, int]]
    numbers: list[tuple[int, int]]
    seed: list[tuple[int, int]]
    written: list[int]
    dropped: list[int]
    sources: list[tuple[bool, int]]
    guards: list[Guard]
    output: StepOutput
    recording: Recording
    known: dict[Leaf, Any]
    num_replays: int = 0
    num_checked: int = 0
    audit_at: int = 2
    _loop: tuple[Loop | None] | None = None
    _gather: Callable[[list[Any]], Sequence[Any]] | None = None
    _scatter: tuple[int, Callable[[list[Any]], Sequence[Any]]] | None = None

    @classmethod
    def of(cls, recording: Recording, constants: Sequence[Any], previous: Recording, numbers: dict[Slot, int]) -> Self:
        """Makes a program of a step's trace.

        Args:
          recording: the trace.
          constants: of its graph, as inputs.
          previous: an equal one.
          numbers: of the slots; new ones are added.
        """
        for slot in recording.slots:
            numbers.setdefault(slot, len(numbers))
        places: dict[str, list[tuple[int, Any]]] = {}
        for place, source in enumerate(recording.inputs):
            places.setdefault(source.kind, []).append((place, source.key))
        template: list[Any] = [None] * len(recording.inputs)
        for place, number in places.get("constant", []):
            template[place] = constants[number]
        return cls(
            compiled=recording.compiled, template=template,
            slots=[(place, numbers[slot]) for place, slot in places.get("slot", [])],
            batch=places.get("batch", []), numbers=places.get("number", []),
            seed=places.get("seed", []),
            written=[numbers[slot] for slot in recording.written],
            dropped=[numbers[slot] for slot in recording.dropped if slot in numbers],
            sources=[(source.kind == "batch", source.key) for source in recording.sources],
            guards=recording.guards, output=recording.output, recording=recording,
            known={leaf: value for leaf, value in recording.leaves.items()
                   if leaf not in moved_numbers(previous.leaves, recording)})

    def may_run(self, state: ReplicaState, batch: SentBatch, numbers: Mapping[Slot, int]) -> bool:
        """Whether the step would read what the program's trace read; waits for the device where it read anything."""
        if not self.guards:
            return True
        values: dict[str, Callable[[Any], Any]] = {
            "slot": lambda slot: state.values[numbers[slot]],
            "batch": lambda number: batch.arrays[number],
            "seed": lambda num_draws: _seed_value(state, num_draws)}
        return all(guard.holds(values) for guard in self.guards)

    def feed(self, state: ReplicaState, batch: Sequence[Any], of_optimizers: OptimizerNumbers) -> list[Any]:
        """Returns the inputs of the next step."""
        numbers = of_optimizers.sent(state.runtime.engine.put_numbers) if self.numbers else ()
        seeds = [_seed_value(state, num_draws) for _, num_draws in self.seed]
        pool = [*self.template, *batch, *numbers, *seeds, *state.values]
        if self._gather is None:  # there may be thousands of inputs: no line of Python for each
            places = list(range(len(self.template)))
            start = len(places)
            for found, width in ((self.batch, len(batch)), (self.numbers, len(numbers)),
                                 ([(place, i) for i, (place, _) in enumerate(self.seed)], len(seeds)),
                                 (self.slots, 0)):
                for place, number in found:
                    places[place] = start + number
                start += width
            self._gather = _getter(places)
        return list(self._gather(pool))

    def write(self, values: list[Any], results: Sequence[Any]) -> list[Any]:
        """Returns the values of all slots after the step.

        Args:
          values: of all slots, before it.
          results: the outputs of the program.
        """
        num_values = len(values)
        if self._scatter is None or self._scatter[0] != num_values:
            places = list(range(num_values))
            for output, number in enumerate(self.written):
                places[number] = num_values + 1 + output
            for number in self.dropped:
                places[number] = num_values
            self._scatter = num_values, _getter(places)
        return list(self._scatter[1]([*values, None, *results]))

    @property
    def may_loop(self) -> bool:
        """Whether it is not known that its steps had better run one at a time."""
        return self._loop != (None,)

    def loop(self, num_steps: int, engine: Engine) -> Loop | None:
        """Compiles a loop of so many steps, at the first call; returns None where they had better run one at a time."""
        if self._loop is None:
            places = {number: place for place, number in self.slots}
            moves_groups = any(leaf[0] == "group" for leaf, _ in self.recording.plan.moves)
            loop = None
            if self.compiled and places.keys() >= set(self.written) and not (
                    self.guards or self.dropped or moves_groups):
                of_each = [place for place, _ in (*self.batch, *self.numbers, *self.seed)]
                run = engine.compile_loop(
                    self.compiled.program, num_steps,
                    [(places[number], output) for output, number in enumerate(self.written)], of_each,
                    self.recording.given, self.recording.made)
                if run is not None:
                    loop = Loop(program=self, run=run, engine=engine)
            self._loop = (loop,)
        return self._loop[0]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Loop:
    """Several steps of a program, as a loop on the device.

    Attributes:
      program: of one step.
      run: starts the loop.
      engine: makes its inputs.
    """

    program: Program
    run: Run
    engine: Engine
    _sent: dict[int, tuple[list[Any], Any]] = field(default_factory=dict)

    def feed(self, state: ReplicaState, batch: Sequence[Any],
             numbers: Sequence[tuple[NumberPlan, Sequence[Any]]]) -> list[Any]:
        """Returns the inputs, and moves the random seed on.

        Args:
          state: that the first step starts from.
          batch: the tensors of the batches of all steps, [number of steps, ...].
          numbers: for each step the plan and the numbers of its optimizers.
        """
        program, stack = self.program, self.engine.stack
        feed = program.template.copy()
        for place, number in program.slots:
            feed[place] = state.values[number]
        for place, number in program.batch:
            feed[place] = batch[number]
        for (place, _), column in zip(program.numbers, self._columns(numbers), strict=True):
            feed[place] = column
        seeds: list[list[Any]] = [[] for _ in program.seed]
        for _ in numbers:
            for of_place, (_, num_draws) in zip(seeds, program.seed, strict=True):
                of_place.append(_seed_value(state, num_draws))
            state.seed = graph.next_seed(state.seed)
        for of_place, (place, _) in zip(seeds, program.seed, strict=True):
            feed[place] = stack(of_place)
        return feed

    def _columns(self, numbers: Sequence[tuple[NumberPlan, Sequence[Any]]]) -> Iterator[Any]:
        """Yields each number of the optimizers in all steps, as an input; sent anew where one changed."""
        for _, number in self.program.numbers:
            column = [of_step[number] for _, of_step in numbers]
            sent = self._sent.get(number)
            if sent is None or sent[0] != column:
                (array,) = self.engine.put_numbers([column], [numbers[0][0].dtypes[number]])
                sent = self._sent[number] = column, array
            yield sent[1]


def _getter(places: Sequence[int]) -> Callable[[list[Any]], Sequence[Any]]:
    """Returns a function from a list to its values at some places."""
    if len(places) < 2:
        return lambda pool: [pool[place] for place in places]
    return operator.itemgetter(*places)


def _seed_value(state: ReplicaState, num_draws: int) -> Any:
    seed = state.seed
    for _ in range(num_draws):
        seed = graph.seed_after_draw(seed)
    return state.runtime.seed(seed)


def moved_numbers(leaves: Mapping[Leaf, Any], recording: Recording) -> list[Leaf]:
    """Returns the numbers of optimizers that are others in a recording."""
    return [leaf for leaf, value in leaves.items() if recording.leaves.get(leaf) != value]
