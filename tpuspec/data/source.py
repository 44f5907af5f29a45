"""Calls input_fn and turns what it returns into an iterator of raw batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tpuspec.data.host_values import collate_rows
from tpuspec.data.position import (
    Batches,
    ListBatches,
    Position,
    ShuffledBatches,
    StatefulBatches,
    check_start,
    is_stateful,
)
from tpuspec.data.share import Share, shared_batches
from tpuspec.errors import InputError, InputTypeError
from tpuspec.spec.functions import describe
from tpuspec.spec.mode import ModeKeys


class RawBatches(Iterator[Any], Protocol):
    """An iterator of batches that knows where it stands."""

    def position(self) -> Position:
        """Returns where it stands, behind the batch that was drawn last."""
        ...

    def close(self) -> None:
        """Lets go of the input before its end."""
        ...


def raw_batches(source: Any, *, input_fn: Callable[..., Any], mode: ModeKeys, batch_size: int | None, seed: int,
                start: Position | None = None, strict: bool = True, share: Share | None = None) -> RawBatches:
    """Returns an iterator over the batches of what input_fn returned.

    A map-style Dataset is batched here. In TRAIN it is shuffled by seed and epoch, repeated without end, and a short
    last batch is dropped; a run that goes on from a step goes on with the batches behind it. An IterableDataset is
    batched and read once. A DataLoader, or any other iterable, yields batches as it is.

    Args:
      source: what input_fn returned.
      input_fn: for messages.
      mode: the mode.
      batch_size: rows of a batch; needed for a Dataset.
      seed: of the shuffle.
      start: where a training input stood; None is its start.
      strict: whether a start that this input cannot go back to is an error; else it begins anew.
      share: the rows of each step of a map-style Dataset that are this call's; None for all.

    Raises:
      InputError: one batch instead of an iterable of batches, or a Dataset that cannot fill one batch.
      InputTypeError: not iterable.
      CheckpointError: strict, and it cannot go back to `start`.
    """
    if isinstance(source, Tensor | np.ndarray | tuple | Mapping):
        raise InputError(
            f"input_fn ({describe(input_fn)}) should return a Dataset, a DataLoader or an iterable of batches; got one "
            f"batch ({type(source).__name__}). Return [batch] for a single batch, or itertools.repeat(batch) for the "
            "same one at every step.")
    if isinstance(source, Dataset):
        return _dataset_batches(source, mode=mode, batch_size=batch_size, seed=seed, start=start, strict=strict,
                                share=share)
    if not isinstance(source, Iterable):
        raise InputTypeError(
            f"input_fn ({describe(input_fn)}) should return a Dataset, a DataLoader or an iterable of batches; got "
            f"{type(source).__name__}.")
    if is_stateful(source):
        return StatefulBatches(source, check_start(start, "state", strict=strict))
    if isinstance(source, list):
        return ListBatches(source, check_start(start, "list", strict=strict))
    check_start(start, "iterable", strict=strict)
    return Batches(source)


def _dataset_batches(dataset: Dataset[Any], *, mode: ModeKeys, batch_size: int | None, seed: int,
                     start: Position | None, strict: bool, share: Share | None) -> RawBatches:
    training = mode is ModeKeys.TRAIN
    if batch_size is None:
        raise InputError(f"a Dataset needs a batch size to be batched by; pass the batch size of mode {mode} to "
                         "Trainer, or return a DataLoader.")
    # A generator of its own: a DataLoader would otherwise draw from torch's global random state.
    generator = torch.Generator().manual_seed(seed)
    if isinstance(dataset, IterableDataset):
        if is_stateful(dataset):
            start = check_start(start, "state", strict=strict)
            loader = DataLoader(dataset, batch_size=batch_size, drop_last=training, generator=generator,
                                collate_fn=collate_rows)
            return StatefulBatches(dataset, start, loader)
        check_start(start, "iterable", strict=strict)
        return Batches(DataLoader(dataset, batch_size=batch_size, drop_last=training, generator=generator,
                                  collate_fn=collate_rows))
    num_rows = len(dataset)  # type: ignore[arg-type]
    step_size = batch_size if share is None else share.step_size(batch_size)
    if training and 0 < num_rows < step_size:
        raise InputError(f"the training Dataset has {num_rows} rows, less than one batch of {step_size}. "
                         "Lower train_batch_size.")
    if not training and share is not None:
        return Batches(shared_batches(dataset, share, batch_size))
    if not training:
        return Batches(DataLoader(dataset, collate_fn=collate_rows, batch_size=batch_size, generator=generator))
    start = check_start(start, "dataset", num_rows=num_rows, strict=strict)
    return ShuffledBatches(dataset, batch_size, seed, start, share or Share())
