"""Tensors of the host as arrays of jax, and back."""

from __future__ import annotations

import collections
import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor

from tpuspec.spec.engine import OfStep
from tpuspec.spec.pieces import Piece, Pieces

_OF_NUMPY = frozenset({torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
                       torch.uint8, torch.bool, torch.complex64, torch.complex128})

_BFLOAT16 = np.dtype(jax.numpy.bfloat16)
_ALIGNMENT = 64
_MOST_KEPT_BYTES, _MOST_KEPT = 1 << 18, 64
_REFERENCES = 3, 4
"""To an array that the pool alone holds, and to its memory, which views of it hold, as `sys.getrefcount` counts."""


def host_array(tensor: Tensor) -> Any:
    """Returns a copy of a host tensor that a program takes as it is: the tensor may be written at once."""
    if tensor.dtype in _OF_NUMPY:
        return np.array(_as_numpy(tensor))
    with jax.enable_x64(True):
        return jax.dlpack.from_dlpack(tensor.detach().clone(memory_format=torch.contiguous_format))


def _as_numpy(tensor: Tensor) -> Any:
    # Each call of torch lets go of Python's lock, which other threads then have: none that is not needed.
    if tensor.requires_grad or tensor.is_conj() or tensor.is_neg():
        tensor = tensor.detach().resolve_conj().resolve_neg()
    return tensor.numpy()


class Buffers:
    """Host memory for the batches of steps, used again once no program and nobody else holds it.

    New memory of this size costs more than a small step: it is freed on another thread than it is taken on. Large
    arrays, whose copy costs more, are made anew, so that little is kept.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], collections.deque[Any]] = {}

    def take(self, shape: tuple[int, ...], dtype: Any, place: int = 0) -> Any:
        """Returns an array to be filled, aligned so that programs on the CPU read it where it lies.

        Args:
          shape, dtype: of the array.
          place: of it among those of a batch, which are used in turn.
        """
        key = (place, shape, dtype)
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = collections.deque(maxlen=_MOST_KEPT)
        if kept:
            array, memory = kept[0]
            if (sys.getrefcount(array), sys.getrefcount(memory)) == _REFERENCES:
                kept.rotate(-1)
                return array
        array, memory = _aligned(shape, dtype)
        if array.nbytes <= _MOST_KEPT_BYTES:
            kept.append((array, memory))
        return array

    def copies(self, tensors: Sequence[Tensor]) -> list[Any]:
        """Returns copies of host tensors that a program takes as they are: the tensors may be written at once."""
        copies = []
        for place, tensor in enumerate(tensors):
            if tensor.dtype in _OF_NUMPY:
                values = _as_numpy(tensor)
                copy = self.take(values.shape, values.dtype, place)
                np.copyto(copy, values)
                copies.append(copy)
            else:
                copies.append(host_array(tensor))
        return copies

    def stacks(self, steps: Sequence[Sequence[Tensor]]) -> list[Any] | None:
        """Returns copies of the tensors of several steps, [number of steps, ...] each; None where numpy lacks a dtype.

        Args:
          steps: for each step its tensors, of one form.
        """
        stacks = []
        for place, tensors in enumerate(zip(*steps, strict=True)):
            if tensors[0].dtype not in _OF_NUMPY:
                return None
            values = [_as_numpy(tensor) for tensor in tensors]
            stack = self.take((len(values), *values[0].shape), values[0].dtype, place)
            for step, of_step in enumerate(values):
                stack[step] = of_step
            stacks.append(stack)
        return stacks


def _aligned(shape: tuple[int, ...], dtype: Any) -> tuple[Any, Any]:
    """Returns an array that is not filled, and its memory."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start:start + num_bytes].view(dtype).reshape(shape), memory


def fetch(arrays: Sequence[Any], *, is_near: bool = False) -> list[Tensor]:
    """Copies arrays to the host; waits for the programs that compute them. The tensors may be written.

    Args:
      arrays: of jax or numpy, or `OfStep`.
      is_near: whether they lie in the memory of the host.
    """
    several = {id(of_step.array): of_step.array for of_step in arrays if isinstance(of_step, OfStep)}
    for array in () if is_near else (*several.values(), *arrays):
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
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))
