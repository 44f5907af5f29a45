"""Tensors of the host as arrays of jax, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor

from tpuspec.spec.engine import OfStep

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


def _tensor(array: Any) -> Tensor:
    if array.dtype == jax.numpy.bfloat16:
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))
