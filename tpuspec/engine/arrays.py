"""Tensors of the host as arrays of jax, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor

from tpuspec.spec.engine import OfStep
from tpuspec.spec.pieces import Piece, Pieces

_FEW_BYTES = 1 << 16
_OF_NUMPY = frozenset({torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
                       torch.uint8, torch.bool, torch.complex64, torch.complex128})


def host_array(tensor: Tensor) -> Any:
    """Returns a copy of a host tensor that a program takes as it is: the tensor may be written at once."""
    tensor = tensor.detach()
    if tensor.dtype in _OF_NUMPY:
        return np.array(tensor.resolve_conj().resolve_neg().numpy())
    with jax.enable_x64(True):
        return jax.dlpack.from_dlpack(tensor.clone(memory_format=torch.contiguous_format))


def fetch(arrays: Sequence[Any]) -> list[Tensor]:
    """Copies arrays to the host; waits for the programs that compute them. The tensors may be written."""
    several = {id(of_step.array): of_step.array for of_step in arrays if isinstance(of_step, OfStep)}
    for array in (*several.values(), *arrays):
        if isinstance(array, jax.Array):
            array.copy_to_host_async()
    tensors = {number: _tensor(array) for number, array in several.items()}
    return [tensors[id(array.array)][array.step] if isinstance(array, OfStep) else _tensor(array) for array in arrays]


def fetch_pieces(arrays: Sequence[Any]) -> list[Tensor | Pieces]:
    """Copies to the host what this process has of arrays; waits for the programs that compute them.

    Returns:
      Tensors of those that it has whole; of the others its pieces, but no second copy of what another process has.
    """
    shards = [[] if array.is_fully_replicated else [
        shard for shard in array.addressable_shards if shard.replica_id == 0] for array in arrays]
    for shard in (shard for own in shards for shard in own):
        shard.data.copy_to_host_async()
    return [_tensor(array.addressable_data(0)) if array.is_fully_replicated else Pieces(
        torch.Size(array.shape), _dtype(array), tuple(
            Piece(tuple(part.start or 0 for part in shard.index), _tensor(shard.data)) for shard in own))
        for array, own in zip(arrays, shards, strict=True)]


def _dtype(array: Any) -> torch.dtype:
    if array.dtype == jax.numpy.bfloat16:
        return torch.bfloat16
    return torch.from_numpy(np.empty(0, array.dtype)).dtype


def _tensor(array: Any) -> Tensor:
    if array.dtype == jax.numpy.bfloat16:
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))
