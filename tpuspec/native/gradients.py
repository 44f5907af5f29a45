"""Gradients of several processes, summed in few large messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tpuspec.precision import reduction_dtype

_BUCKET_BYTES = 32 << 20


def sum_gradients(parameters: Sequence[Tensor], all_reduce: Callable[[Tensor], None], *, scale: float) -> None:
    """Replaces each gradient by its sum over all processes, times `scale`.

    A parameter without a gradient on some processes counts as zeros there; without one on all, it stays so. Halves are
    summed as float32.

    Args:
      parameters: the same ones in the same order on every process.
      all_reduce: sums a tensor over the processes, in place.
      scale: 1 / processes for the mean.
    """
    if not parameters:
        return
    for bucket in _buckets(parameters):
        first = bucket[0]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in bucket]
        dtype = reduction_dtype(first.dtype)
        # How many processes have each gradient travels with them, exact in every dtype for the sizes of clusters.
        present = torch.tensor([float(p.grad is not None) for p in bucket], dtype=dtype, device=first.device)
        flat = torch.cat([present, *(gradient.reshape(-1).to(dtype) for gradient in gradients)])
        all_reduce(flat)
        counts = flat[:len(bucket)].tolist() if any(p.grad is None for p in bucket) else [1.0] * len(bucket)
        place = len(bucket)
        for parameter, count in zip(bucket, counts, strict=True):
            size = parameter.numel()
            if count:
                summed = flat[place:place + size].view(parameter.shape)
                parameter.grad = (summed if scale == 1.0 else summed.mul_(scale)).to(parameter.dtype)
            place += size


def _buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yields parameters of one dtype and device, about a bucket's bytes at a time."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for group in kinds.values():
        bucket: list[Tensor] = []
        size = 0
        for parameter in group:
            bucket.append(parameter)
            size += parameter.numel() * parameter.element_size()
            if size >= _BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket
