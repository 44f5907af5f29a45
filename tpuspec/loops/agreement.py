"""What all hosts of a run decide together, in the loop's thread: the next batch, the end, the size of a loop, saves.

On one host nothing is asked: each function then answers by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from tpuspec.checkpoint.policy import SavePolicy
from tpuspec.checkpoint.state import TrainingState
from tpuspec.config import LoopLength
from tpuspec.data.deployment import InputPlan
from tpuspec.data.pipeline import HostBatch, InputPipeline
from tpuspec.data.prefetch import PrefetchedBatches
from tpuspec.data.random_state import ProcessRandomState
from tpuspec.drain.drain import DrainedStep
from tpuspec.errors import InputError
from tpuspec.loops.iterations import LoopSizer
from tpuspec.spec.backend import Topology
from tpuspec.spec.coordinator import Coordinator
from tpuspec.spec.mode import ModeKeys
from tpuspec.spec.phase import in_phase
from tpuspec.spec.results import Batch, StepRows

_STOP = "stop"


class AgreedSizer(LoopSizer):
    """Sizes of loops that fill the chief's time; one that counts steps asks nobody.

    Args:
      coordinator: of the hosts.
      length, last_step: as in LoopSizer.
    """

    def __init__(self, coordinator: Coordinator, length: LoopLength, last_step: int | None) -> None:
        super().__init__(length, last_step)
        self._coordinator = coordinator
        self._asks = length.unit != "count" and coordinator.num_hosts > 1

    def next_size(self, step: int, *, stops: bool = False) -> int:
        """Returns the steps of the loop that starts after `step`; the same on every host that does not stop.

        A host that stops where nobody asks is noticed by the others at their next batch.
        """
        size = super().next_size(step, stops=stops)
        if not self._asks:
            return size
        sizes = self._coordinator.exchange(size, name="the next loop")
        return sizes[0] if all(sizes) else 0


class AgreedSavePolicy(SavePolicy):
    """A policy that follows the chief's clock; only one that goes by time asks it.

    Args:
      coordinator: of the hosts.
      every_steps, every_seconds: as in SavePolicy.
    """

    def __init__(self, coordinator: Coordinator, every_steps: int | None, every_seconds: float | None) -> None:
        super().__init__(every_steps, every_seconds)
        self._coordinator = coordinator
        self._asks = bool(every_seconds) and coordinator.num_hosts > 1

    def should_save(self, step: int) -> bool:
        """Whether to save now; the same on every host."""
        due = super().should_save(step)
        return self._coordinator.exchange(due, name="a save")[0] if self._asks else due


class NoSave:
    """Takes a CheckpointManager's place on hosts that are not the chief: marks saves, and writes nothing."""

    def __init__(self, save_policy: SavePolicy) -> None:
        self.save_policy = save_policy

    def save(self, state: TrainingState, *, wait: bool = True) -> None:
        """Marks the step as saved."""
        self.save_policy.saved(state.global_step)

    def check(self) -> None:
        """Nothing is under way."""

    def wait(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing is under way."""


class InputEnd:
    """Where an input ends before its end; on one host nobody else has to know.

    Attributes:
      was_stopped: whether a host stopped, and the input has not come to its end.
      is_shared: whether there are other hosts.
    """

    was_stopped = False
    is_shared = False

    def end(self) -> None:
        """Ends the input of all hosts, unless it has ended."""


class AgreedInput(InputEnd):
    """One host's input, in step with that of the others: rows are told of all hosts, and all end together.

    Each host draws its own batches ahead; the hosts ask one another when the loop takes one, on its thread.

    In training the first host that ends ends all; in evaluation and prediction those that have ended go on with padding
    until the last one ends. Where the chief alone calls input_fn, it deals each batch out. A host that was asked to
    stop calls `end` in place of drawing, and then the input of the others ends there too.

    Args:
      make: calls input_fn and returns its batches.
      num_ahead: batches that are kept ready.
      coordinator: of the hosts.
      plan: the deployment.
      topology: who computes.
      mode: the mode.
    """

    is_shared = True

    def __init__(self, make: Callable[[], InputPipeline], num_ahead: int, coordinator: Coordinator, plan: InputPlan,
                 topology: Topology, mode: ModeKeys) -> None:
        self._coordinator, self._plan, self._topology, self._mode = coordinator, plan, topology, mode
        self._is_dealt = len({call.host for call in plan.calls}) < topology.num_hosts
        with in_phase("input_fn"):
            self._pipeline = make() if plan.on_host(topology.host_index) else None
        self._own = PrefetchedBatches(iter(()) if self._pipeline is None else self._pipeline, num_batches=num_ahead)
        self._has_ended = self._is_over = False

    def __iter__(self) -> Iterator[HostBatch]:
        return self

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Lets no batch be drawn ahead within the block."""
        return self._own.paused()

    def random_state(self) -> ProcessRandomState | None:
        """As that of this host's own batches."""
        return self._own.random_state()

    def close(self) -> None:
        """Lets go of this host's input."""
        self._own.close()

    def __next__(self) -> HostBatch:
        batch = self._draw()
        if batch is not None and any(batch.kept.values()):
            raise InputError(f"features[{next(iter(batch.kept))!r}] holds strings, which predict() passes on within "
                             "one host only; this run has several. Leave them out, or give each row a number.")
        own = None if batch is None else self._counts(batch)
        answers = self._coordinator.exchange(own, name="the next batch")
        if _STOP in answers:
            self._is_over = self.was_stopped = True
            raise StopIteration
        if self._is_dealt:
            answers = [answers[0]]
        ended = [answer is None for answer in answers]
        if any(ended) if self._mode is ModeKeys.TRAIN else all(ended):
            self._is_over = True
            raise StopIteration
        if self._is_dealt:
            batch = self._deal(batch)
        elif batch is None:
            assert self._pipeline is not None
            with in_phase("input_fn"):
                batch = self._pipeline.padding()
        return HostBatch(replicas=batch.replicas, rows=self._rows(batch, answers), position=batch.position)

    def end(self) -> None:
        """Ends the input of all hosts, unless it has ended."""
        if not self._is_over:
            self._is_over = self.was_stopped = True
            self._coordinator.exchange(_STOP, name="the next batch")

    def _draw(self) -> HostBatch | None:
        if self._pipeline is None or self._has_ended:
            return None
        with in_phase("input_fn"):
            batch = next(self._own, None)
        self._has_ended = batch is None
        return batch

    def _counts(self, batch: HostBatch) -> list[int]:
        """Real rows of each replica's batch; they come first in it."""
        if self._plan.broadcast:
            return [batch.rows.num_rows]
        return batch.rows.mask.reshape(len(batch.replicas), -1).sum(1).tolist()

    def _rows(self, batch: HostBatch, answers: list[list[int] | None]) -> StepRows:
        size = self._plan.replica_batch_size
        assert size is not None, "several hosts have one, as on XLA"
        per_host = self._topology.num_replicas_per_host
        counts = [count for answer in answers for count in (answer if answer is not None else [0] * per_host)]
        mask = (torch.arange(size) < torch.tensor(counts)[:, None]).reshape(-1)
        return StepRows(mask=mask, num_rows=sum(counts))

    def _deal(self, batch: HostBatch | None) -> HostBatch:
        per_host = self._topology.num_replicas_per_host
        trees = None if batch is None else [
            [(part.features, part.labels) for part in batch.replicas[host * per_host:(host + 1) * per_host]]
            for host in range(self._topology.num_hosts)]
        dealt = self._coordinator.deal(trees)
        replicas = [Batch(features=features, labels=labels) for features, labels in dealt]
        return HostBatch(replicas=replicas, rows=StepRows(mask=torch.zeros(0, dtype=torch.bool), num_rows=0),
                         position=[] if batch is None else batch.position)


def agreed_input(make: Callable[[], InputPipeline], num_ahead: int, coordinator: Coordinator, plan: InputPlan,
                 topology: Topology, mode: ModeKeys) -> tuple[InputPipeline | AgreedInput, InputEnd]:
    """Returns the batches of all hosts, or on one host those of its pipeline as they are; and what ends them early."""
    if coordinator.num_hosts == 1:
        return make(), InputEnd()
    batches = AgreedInput(make, num_ahead, coordinator, plan, topology, mode)
    return batches, batches


def ends_input(input_end: InputEnd) -> Callable[..., None]:
    """Returns what an ExitStack calls at its end: ends the input of all hosts, unless an error is on its way."""
    def leave(kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, GeneratorExit):  # its user closes a predict()
            input_end.end()

    return leave


def leave_to_chief(step: DrainedStep) -> None:
    """Takes the place of host work on hosts that are not the chief, whose outputs have gone to it."""
