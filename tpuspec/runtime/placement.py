"""Moves a module to a device without untying what its parts share."""

from __future__ import annotations

import torch
from torch import nn


def move_module(module: nn.Module, device: torch.device) -> nn.Module:
    """Moves a module in place; parameters and buffers that were one tensor stay one tensor.

    `nn.Module.to` makes a new Parameter for each name on devices of another kind, which would untie tied weights.
    """
    ties = _tied_names(module)
    module.to(device)
    for kind, names in ties:
        first = _lookup(module, kind, names[0])
        for name in names[1:]:
            owner, _, leaf = name.rpartition(".")
            getattr(module.get_submodule(owner), kind)[leaf] = first
    return module


def _tied_names(module: nn.Module) -> list[tuple[str, list[str]]]:
    ties: dict[tuple[str, int], list[str]] = {}
    for kind, named in (("_parameters", module.named_parameters(remove_duplicate=False)),
                        ("_buffers", module.named_buffers(remove_duplicate=False))):
        for name, tensor in named:
            ties.setdefault((kind, id(tensor)), []).append(name)
    return [(kind, names) for (kind, _), names in ties.items() if len(names) > 1]


def _lookup(module: nn.Module, kind: str, name: str) -> torch.Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), kind)[leaf]
