"""How long an input is, where that is known before it is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from tpuspec.data.host_values import take_host_values
from tpuspec.data.position import Position, is_stateful
from tpuspec.data.structure import count_rows, to_host_batch
from tpuspec.errors import TpuspecError


@dataclass(frozen=True, slots=True, kw_only=True)
class InputLength:
    """The length of an input from where it stands.

    Attributes:
      num_batches: batches that it has left.
      last_rows: rows of the last one; None where that is not known.
    """

    num_batches: int
    last_rows: int | None

    def short_step(self, batch_size: int | None, batches_per_step: int) -> int | None:
        """Returns the step, counted from 1, that draws a batch of fewer rows than batch_size; None for none."""
        if batch_size is None or self.last_rows is None or self.last_rows >= batch_size:
            return None
        return -(-self.num_batches // batches_per_step)


def length_of(source: Any, position: Position) -> InputLength | None:
    """Returns the length of what input_fn returned; None where it is not known, or has no end.

    A list has one, and a DataLoader over a map-style Dataset.

    Args:
      source: what input_fn returned.
      position: where it starts.
    """
    if isinstance(source, list):
        left = source[position.get("batches", 0):]
        return InputLength(num_batches=len(left), last_rows=_rows(left[-1])) if left else None
    if not isinstance(source, DataLoader) or isinstance(source.dataset, IterableDataset) or is_stateful(source):
        return None
    try:
        num_batches = len(source)
        sampler = source.batch_sampler
        if type(sampler) is not BatchSampler:
            return InputLength(num_batches=num_batches, last_rows=None)
        num_rows = len(sampler.sampler)  # type: ignore[arg-type]
    except TypeError:  # a sampler without a length
        return None
    rest = 0 if sampler.drop_last else num_rows % sampler.batch_size
    return InputLength(num_batches=num_batches, last_rows=rest or sampler.batch_size) if num_batches else None


def _rows(element: Any) -> int | None:
    try:
        return count_rows(to_host_batch(take_host_values(element)[0]))
    except TpuspecError:  # it is told when the batch is drawn
        return None
