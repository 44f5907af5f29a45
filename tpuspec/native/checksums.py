"""Sums of parameters, to compare replicas by."""

from __future__ import annotations

import torch
from torch import Tensor


def checksums(model: torch.nn.Module) -> Tensor:
    """Returns the sums of values and of sizes, float32 [number of parameters, 2], on the parameters' device."""
    values = [_real(parameter.detach()).float() for parameter in model.parameters()]
    return torch.stack([torch.stack([value.sum(), value.abs().sum()]) for value in values])


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
