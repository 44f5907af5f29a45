"""Pads short batches, so that every step reuses one compiled graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tpuspec.data.structure import Axes, map_named
from tpuspec.spec.results import Batch


def pad_batch(batch: Batch, num_rows: int, axes: Axes | None = None) -> Batch:
    """Fills every tensor of a batch with zero rows behind the real ones.

    Args:
      batch: tensors [batch, ...], batch <= num_rows.
      num_rows: rows to return.
      axes: where the rows are, if not on axis 0.

    Returns:
      The batch with tensors [num_rows, ...], of the very same tensors if it is full.

    Source: idea of TPUEstimator's padding signals.
    """
    def pad(tensor: Tensor, axis: int) -> Tensor:
        missing = num_rows - tensor.shape[axis]
        if missing == 0:
            return tensor
        zeros = tensor.new_zeros((*tensor.shape[:axis], missing, *tensor.shape[axis + 1:]))
        return torch.cat([tensor, zeros], axis)

    return _map_rows(batch, axes, pad)


def padding_like(batch: Batch, num_rows: int, axes: Axes | None = None) -> Batch:
    """Returns a batch of `num_rows` zero rows with the nesting, row shapes and dtypes of another one."""
    return pad_batch(_map_rows(batch, axes, lambda tensor, axis: tensor.narrow(axis, 0, 0)), num_rows, axes)


def row_mask(num_real: int, num_rows: int) -> Tensor:
    """Returns a bool mask [num_rows]: True for the real rows, which come first."""
    return torch.arange(num_rows) < num_real


def split_rows(batch: Batch, num_parts: int, axes: Axes | None = None) -> list[Batch]:
    """Splits a batch into equal contiguous parts along axis 0, or along `axes`, in order.

    Args:
      batch: tensors [batch, ...], batch divisible by num_parts.
      num_parts: how many parts.
      axes: where the rows are, if not on axis 0.
    """
    if num_parts == 1:
        return [batch]

    def part(i: int) -> Batch:
        def rows(tensor: Tensor, axis: int) -> Tensor:
            size = tensor.shape[axis] // num_parts
            return tensor.narrow(axis, i * size, size)

        return _map_rows(batch, axes, rows)

    return [part(i) for i in range(num_parts)]


def _map_rows(batch: Batch, axes: Axes | None, fn: Callable[[Tensor, int], Tensor]) -> Batch:
    if not axes:
        return batch.map(lambda tensor: fn(tensor, 0))
    return map_named(batch, lambda name, tensor: fn(tensor, axes[name]))
