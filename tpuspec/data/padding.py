"""Pads short batches, so that every step reuses one compiled graph."""

from __future__ import annotations

import torch
from torch import Tensor

from tpuspec.spec.results import Batch


def pad_batch(batch: Batch, num_rows: int) -> Batch:
    """Fills every tensor of a batch with zero rows behind the real ones.

    Args:
      batch: tensors [batch, ...], batch <= num_rows.
      num_rows: rows to return.

    Returns:
      The batch with tensors [num_rows, ...]; the very same one if it is full.

    Source: idea of TPUEstimator's padding signals.
    """
    def pad(tensor: Tensor) -> Tensor:
        missing = num_rows - tensor.shape[0]
        return tensor if missing == 0 else torch.cat([tensor, tensor.new_zeros((missing, *tensor.shape[1:]))])

    return batch.map(pad)


def padding_like(batch: Batch, num_rows: int) -> Batch:
    """Returns a batch of `num_rows` zero rows with the nesting, row shapes and dtypes of another one."""
    return pad_batch(batch.map(lambda tensor: tensor[:0]), num_rows)


def row_mask(num_real: int, num_rows: int) -> Tensor:
    """Returns a bool mask [num_rows]: True for the real rows, which come first."""
    return torch.arange(num_rows) < num_real


def split_rows(batch: Batch, num_parts: int) -> list[Batch]:
    """Splits a batch into equal contiguous parts along axis 0, in order.

    Args:
      batch: tensors [batch, ...], batch divisible by num_parts.
      num_parts: how many parts.
    """
    if num_parts == 1:
        return [batch]

    def part(i: int) -> Batch:
        def rows(tensor: Tensor) -> Tensor:
            size = tensor.shape[0] // num_parts
            return tensor[i * size:(i + 1) * size]

        return batch.map(rows)

    return [part(i) for i in range(num_parts)]
