"""A module on its device: moved there without untying its parts, and with what hangs on its parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


def move_module(module: nn.Module, device: torch.device) -> nn.Module:
    """Moves a module in place; parameters and buffers that were one tensor stay one tensor.

    `nn.Module.to` makes a new Parameter for each name on devices of another kind, which would untie tied weights, and
    lose hooks and attributes of parameters.
    """
    ties, before = _tied_names(module), dict(module.named_parameters(remove_duplicate=False))
    module.to(device)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        _take_over(parameter, before[name])
    for kind, names in ties:
        first = _lookup(module, kind, names[0])
        for name in names[1:]:
            owner, _, leaf = name.rpartition(".")
            getattr(module.get_submodule(owner), kind)[leaf] = first
    return module


def _take_over(parameter: nn.Parameter, before: nn.Parameter) -> None:
    """Gives a parameter the hooks and attributes of the one that it was made of; handles still remove the hooks."""
    if parameter is before:
        return
    vars(parameter).update(vars(before))
    if before._backward_hooks:
        parameter._backward_hooks = before._backward_hooks
    if (hooks := getattr(before, "_post_accumulate_grad_hooks", None)) is not None:
        parameter._post_accumulate_grad_hooks = hooks


@contextlib.contextmanager
def module_as_before(module: nn.Module | None) -> Iterator[None]:
    """Puts back the module's buffers and gradients, which a pass in train() mode may change.

    Copies and write-backs are lazy on XLA: nothing is compiled for them.
    """
    parts = [] if module is None else [(part, dict(part._buffers)) for part in module.modules()]
    values = [(buffer, buffer.clone()) for _, buffers in parts for buffer in buffers.values() if buffer is not None]
    gradients = [] if module is None else [(parameter, parameter.grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        for part, buffers in parts:
            part._buffers.clear()
            part._buffers.update(buffers)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient


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
