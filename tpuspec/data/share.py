"""Which rows of a map-style Dataset are whose, where several calls of input_fn return the same one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, IterableDataset

from tpuspec.data.host_values import collate_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One call's share of the rows of each step.

    Attributes:
      index: number of the call.
      num_calls: all calls.
      batches_per_step: batches that each call draws a step.
    """

    index: int = 0
    num_calls: int = 1
    batches_per_step: int = 1

    def step_size(self, batch_size: int) -> int:
        """Returns the rows of one step, over all calls."""
        return batch_size * self.batches_per_step * self.num_calls

    def of(self, rows: Sequence[int], batch_size: int) -> list[list[int]]:
        """Returns this call's batches of one step's rows; in evaluation the last ones may be short or empty."""
        size = batch_size * self.batches_per_step
        own = list(rows[self.index * size:(self.index + 1) * size])
        return [own[i:i + batch_size] for i in range(0, size, batch_size)]


def is_map_style(source: object) -> bool:
    """Whether a source is a Dataset of numbered rows, which several calls of input_fn can share out."""
    return isinstance(source, Dataset) and not isinstance(source, IterableDataset)


def shared_batches(dataset: Any, share: Share, batch_size: int) -> Iterator[Any]:
    """Yields a call's batches of an evaluation, which together with those of all calls are the rows in order.

    All calls have equally many; one without rows says what a row looks like.
    """
    num_rows, step_size = len(dataset), share.step_size(batch_size)
    for first in range(0, num_rows, step_size):
        for own in share.of(range(first, min(first + step_size, num_rows)), batch_size):
            batch = collate_rows([dataset[i] for i in own or [0]])
            yield batch if own else pytree.tree_map(lambda leaf: leaf[:0] if isinstance(leaf, Tensor) else leaf, batch)
