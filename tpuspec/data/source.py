"""Calls input_fn and turns what it returns into an iterator of raw batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler

from tpuspec.errors import InputError, InputTypeError
from tpuspec.spec.functions import describe
from tpuspec.spec.mode import ModeKeys


def raw_batches(source: Any, *, input_fn: Callable[..., Any], mode: ModeKeys, batch_size: int | None, seed: int,
                start_batch: int = 0) -> Iterator[Any]:
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
      start_batch: batches of a training Dataset to pass over.

    Raises:
      InputError: one batch instead of an iterable of batches, or a Dataset that cannot fill one batch.
      InputTypeError: not iterable.
    """
    if isinstance(source, Tensor | np.ndarray | tuple | Mapping):
        raise InputError(
            f"input_fn ({describe(input_fn)}) should return a Dataset, a DataLoader or an iterable of batches; got one "
            f"batch ({type(source).__name__}). Return [batch] for a single batch, or itertools.repeat(batch) for the "
            "same one at every step.")
    if isinstance(source, Dataset):
        return _dataset_batches(source, mode=mode, batch_size=batch_size, seed=seed, start_batch=start_batch)
    if not isinstance(source, Iterable):
        raise InputTypeError(
            f"input_fn ({describe(input_fn)}) should return a Dataset, a DataLoader or an iterable of batches; got "
            f"{type(source).__name__}.")
    return iter(source)


def _dataset_batches(dataset: Dataset[Any], *, mode: ModeKeys, batch_size: int | None, seed: int,
                     start_batch: int) -> Iterator[Any]:
    training = mode is ModeKeys.TRAIN
    if batch_size is None:
        raise InputError(f"a Dataset needs a batch size to be batched by; pass the batch size of mode {mode} to "
                         "Trainer, or return a DataLoader.")
    # A generator of its own: a DataLoader would otherwise draw from torch's global random state.
    generator = torch.Generator().manual_seed(seed)
    if isinstance(dataset, IterableDataset):
        yield from DataLoader(dataset, batch_size=batch_size, drop_last=training, generator=generator)
        return
    num_rows = len(dataset)  # type: ignore[arg-type]
    if training and 0 < num_rows < batch_size:
        raise InputError(f"the training Dataset has {num_rows} rows, less than one batch of {batch_size}. "
                         "Lower train_batch_size.")
    if not training:
        yield from DataLoader(dataset, batch_size=batch_size, generator=generator)
        return
    if num_rows == 0:
        return
    epoch, first = divmod(start_batch, num_rows // batch_size)
    while True:
        order = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed + epoch))  # type: ignore[arg-type]
        batches = list(BatchSampler(order, batch_size, drop_last=True))[first:]
        yield from DataLoader(dataset, batch_sampler=batches, generator=generator)
        epoch, first = epoch + 1, 0
