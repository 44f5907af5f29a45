"""Where an input stands: iterators of batches that can say it, and go on from it in another process.

A position is a dict for a checkpoint, with its "kind": 'dataset' (epoch, rows of it, length and shuffle seed), 'list'
(batches), 'state' (the iterable's own state_dict), 'iterable' (nothing that could be gone back to) or 'ended'.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from tpuspec.data.host_values import collate_rows
from tpuspec.data.share import Share
from tpuspec.data.workers import WorkerBatches, start_iterator
from tpuspec.errors import CheckpointError

Position = dict[str, Any]
ENDED: Position = {"kind": "ended"}


class Batches:
    """An iterator of batches that counts; nothing can go back to where it stood, but to its start."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = start_iterator(batches)
        self._num_batches = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = next(self._batches)
        self._num_batches += 1
        return batch

    def position(self) -> Position:
        """Returns where it stands behind the batch that was drawn last."""
        return {"kind": "iterable", "batches": self._num_batches}

    def close(self) -> None:
        """Lets go of the batches; a DataLoader's workers end."""
        if isinstance(self._batches, WorkerBatches):
            self._batches.close()
        self._batches = iter(())


class ListBatches(Batches):
    """Batches of a list, which can be read on from any of them."""

    def __init__(self, batches: list[Any], start: Position | None) -> None:
        # Read to its last batch: as with any input that ended, the next training reads it again.
        first = 0 if start is None or start["batches"] >= len(batches) else start["batches"]
        super().__init__(batches[first:])
        self._num_batches = first

    def position(self) -> Position:
        """Returns the number of batches that were drawn."""
        return {"kind": "list", "batches": self._num_batches}


class StatefulBatches(Batches):
    """Batches of an iterable with state_dict and load_state_dict, such as torchdata's StatefulDataLoader."""

    def __init__(self, source: Any, start: Position | None, batches: Any = None) -> None:
        if start is not None:
            source.load_state_dict(start["state"])
        super().__init__(source if batches is None else batches)
        self._stateful = source

    def position(self) -> Position:
        """Returns a copy of the iterable's own state."""
        return {"kind": "state", "state": copy.deepcopy(self._stateful.state_dict())}


class ShuffledBatches:
    """Batches of a training Dataset: shuffled by seed and epoch, repeated without end, without a short last one."""

    def __init__(self, dataset: Dataset[Any], batch_size: int, seed: int, start: Position | None,
                 share: Share) -> None:
        self._dataset, self._batch_size, self._share = dataset, batch_size, share
        self._num_rows = len(dataset)  # type: ignore[arg-type]
        # The seed of the run that began: one without a seed of its own is resumed exactly too.
        self._seed = seed if start is None else start["seed"]
        self._epoch, self._rows = (0, 0) if start is None else (start["epoch"], start["rows"])
        self._iterator = self._batches() if self._num_rows else iter(())

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._iterator)

    def _batches(self) -> Iterator[Any]:
        while True:
            seed = self._seed + self._epoch
            order = list(RandomSampler(self._dataset, generator=torch.Generator().manual_seed(seed)))  # type: ignore
            size = self._share.step_size(self._batch_size)
            batches = [batch for step in BatchSampler(order[self._rows:], size, drop_last=True)
                       for batch in self._share.of(step, self._batch_size)]
            # A generator of its own: a DataLoader would otherwise draw from torch's global random state.
            own = torch.Generator().manual_seed(seed)
            loader = DataLoader(self._dataset, collate_fn=collate_rows, batch_sampler=batches, generator=own)
            for number, batch in enumerate(loader, start=1):
                # Those of a step over all calls, at its last batch: the position is then the same for every call.
                self._rows += size if number % self._share.batches_per_step == 0 else 0
                yield batch
            self._epoch, self._rows = self._epoch + 1, 0

    def position(self) -> Position:
        """Returns epoch and row, with what they depend on."""
        return {"kind": "dataset", "epoch": self._epoch, "rows": self._rows, "num_rows": self._num_rows,
                "seed": self._seed}

    def close(self) -> None:
        """Lets go of the batches."""
        self._iterator = iter(())


def check_start(start: Position | None, kind: str, *, num_rows: int | None = None, strict: bool) -> Position | None:
    """Returns the position to start from; None is the start of the input.

    Args:
      start: where the input stood; None at the first training.
      kind: of this input.
      num_rows: of this Dataset.
      strict: whether a position that cannot be gone back to is an error.

    Raises:
      CheckpointError: it cannot be gone back to.
    """
    if start is None or start["kind"] == "ended":
        return None
    if start["kind"] == kind != "iterable" and start.get("num_rows") == num_rows:
        return start
    if not strict:
        return None
    if start["kind"] != kind:
        why = f"the checkpoint's input is of kind {start['kind']!r}, and input_fn now returns {kind!r}"
    elif kind == "iterable":
        why = "input_fn returns an iterable that cannot be put back to where it stood"
    else:
        why = f"the checkpoint's Dataset had {start['num_rows']} rows, and this one has {num_rows}"
    raise CheckpointError(
        f"The run cannot be resumed exactly: {why}. Return a Dataset or a list, give the iterable state_dict and "
        "load_state_dict, or set RunConfig(allow_inexact_resume=True), which reads the input from its start.")


def start_of(positions: Sequence[Position]) -> list[Position] | None:
    """Returns where an input stood before its first batch, from where it stands behind it.

    That matters to a Dataset, whose shuffle has a seed; any other input is at its start without a word.
    """
    if not positions or any(position["kind"] != "dataset" for position in positions):
        return None
    return [{**position, "epoch": 0, "rows": 0} for position in positions]


def is_stateful(source: Any) -> bool:
    """Whether an iterable can save and load where it stands."""
    return callable(getattr(source, "state_dict", None)) and callable(getattr(source, "load_state_dict", None))


def common_start(starts: Sequence[Mapping[str, Any]] | None, index: int, num_calls: int) -> Position | None:
    """Returns the position for one call of input_fn; with another number of calls one that all had in common."""
    if not starts:
        return None
    if len(starts) == num_calls:
        return dict(starts[index])
    return dict(starts[0]) if all(start == starts[0] for start in starts) else {"kind": "other calls of input_fn"}
