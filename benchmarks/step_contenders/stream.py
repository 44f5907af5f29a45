"""Batches as a DataLoader, for the frameworks that take nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

Pair = tuple[Tensor, Tensor]


class Stream(IterableDataset[Pair]):
    """Goes round the batches until `num_batches` were yielded."""

    def __init__(self, batches: Sequence[Pair], num_batches: int) -> None:
        self.batches, self.num_batches = batches, num_batches

    def __iter__(self) -> Iterator[Pair]:
        return (self.batches[k % len(self.batches)] for k in range(self.num_batches))


def make_loader(batches: Sequence[Pair], num_batches: int) -> DataLoader[Pair]:
    return DataLoader(Stream(batches, num_batches), batch_size=None)
