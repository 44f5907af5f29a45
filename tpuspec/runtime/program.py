"""A captured step as a program: what it is fed with, what it writes, and when it stands for the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from tpuspec.runtime import graph
from tpuspec.runtime.guards import Guard
from tpuspec.runtime.optimizer_numbers import OptimizerNumbers
from tpuspec.runtime.recording import Recording
from tpuspec.runtime.replica_state import ReplicaState
from tpuspec.runtime.slots import Slot
from tpuspec.runtime.traced_numbers import Leaf
from tpuspec.spec.results import Batch, StepOutput


@dataclass(slots=True, eq=False)
class Program:
    """A captured step, ready to be replayed on every replica.

    Attributes:
      graph: its hash.
      templates: for each replica the graph's inputs, with its constants in their places.
      slots, batch, numbers: (place among the inputs, number of the slot, batch tensor or optimizers' number).
      seed: (place, (number of the step in the program, draws before)) of the random seeds.
      written: numbers of the slots that the first outputs are.
      dropped: numbers of the gradients that are gone afterwards.
      sources: (from the batch, number) of each tensor for the host.
      guards: for each replica what the step read from the device.
      outputs: for each replica the output of the trace, whose functions and form stay.
      recording: the first replica's, to hold later traces against.
      known: numbers of optimizers that were the same in both traces: whether the graph follows them is not known.
      num_replays: since the last audit.
      num_checked: replays before the last trace that it was held against.
      audit_at: replays from one audit to the next: 2, and as many as before, up to the setting.
    """

    graph: bytes
    templates: list[list[Any]]
    slots: list[tuple[int, int]]
    batch: list[tuple[int, int]]
    numbers: list[tuple[int, int]]
    seed: list[tuple[int, tuple[int, int]]]
    written: list[int]
    dropped: list[int]
    sources: list[tuple[bool, int]]
    guards: list[list[Guard]]
    outputs: list[StepOutput]
    recording: Recording
    known: dict[Leaf, Any]
    num_replays: int = 0
    num_checked: int = 0
    audit_at: int = 2

    @classmethod
    def of(cls, recordings: Sequence[Recording], previous: Recording, numbers: dict[Slot, int]) -> Self:
        """Makes a program of a step's trace.

        Args:
          recordings: of each replica.
          previous: an equal one of the first replica.
          numbers: of the slots; new ones are added.
        """
        first = recordings[0]
        for slot in first.slots:
            numbers.setdefault(slot, len(numbers))
        places: dict[str, list[tuple[int, Any]]] = {}
        for place, source in enumerate(first.inputs):
            places.setdefault(source.kind, []).append((place, source.key))
        templates = []
        for recording in recordings:
            template: list[Any] = [None] * len(recording.inputs)
            for place, number in places.get("constant", []):
                template[place] = recording.constants[number]
            templates.append(template)
        return cls(
            graph=first.graph, templates=templates,
            slots=[(place, numbers[slot]) for place, slot in places.get("slot", [])],
            batch=places.get("batch", []), numbers=places.get("number", []),
            seed=places.get("seed", []),
            written=[numbers[slot] for slot in first.written],
            dropped=[numbers[slot] for slot in first.dropped if slot in numbers],
            sources=[(source.kind == "batch", source.key) for source in first.sources],
            guards=[recording.guards for recording in recordings],
            outputs=[recording.output for recording in recordings], recording=first,
            known={leaf: value for leaf, value in first.leaves.items()
                   if leaf not in moved_numbers(previous.leaves, first)})

    def may_run(self, states: Sequence[ReplicaState], batches: Sequence[Batch], numbers: Mapping[Slot, int]) -> bool:
        """Whether the step would read what the program's trace read; waits for the device where it read anything."""
        if not self.guards[0]:
            return True
        try:
            return all(self._holds(*of_one, numbers) for of_one in zip(states, self.guards, batches, strict=True))
        finally:
            graph.use_device(states[0].device)

    def _holds(self, state: ReplicaState, guards: Sequence[Guard], batch: Batch, numbers: Mapping[Slot, int]) -> bool:
        graph.use_device(state.device)
        values: dict[str, Callable[[Any], Any]] = {
            "slot": lambda slot: state.values[numbers[slot]],
            "batch": lambda number: batch.tensors()[number],
            "seed": lambda key: _seed_value(state, *key)}
        return all(guard.holds(values) for guard in guards)

    def feed(self, ordinal: int, state: ReplicaState, batch: Sequence[Tensor], of_optimizers: OptimizerNumbers,
             ) -> list[Any]:
        """Returns the inputs of a replica's next step."""
        values, feed = state.values, self.templates[ordinal].copy()
        for place, number in self.slots:
            feed[place] = values[number]
        for place, number in self.batch:
            feed[place] = batch[number]
        if self.numbers:
            numbers = of_optimizers.sent(state.replica)
            for place, number in self.numbers:
                feed[place] = numbers[number]
        for place, key in self.seed:
            feed[place] = _seed_value(state, *key)
        return feed


def _seed_value(state: ReplicaState, step: int, num_draws: int) -> Tensor:
    seed = graph.seed_after(state.seed, step)
    for _ in range(num_draws):
        seed = graph.seed_after_draw(seed)
    return graph.seed_value(seed, state.device)


def moved_numbers(leaves: Mapping[Leaf, Any], recording: Recording) -> list[Leaf]:
    """Returns the numbers of optimizers that are others in a recording."""
    return [leaf for leaf, value in leaves.items() if recording.leaves.get(leaf) != value]
