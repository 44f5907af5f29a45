"""A module on its device: moved there without untying its parts, and with what hangs on its parameters."""

from __future__ import annotations

import contextlib
import copy
import warnings
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy


def move_module(module: nn.Module, device: torch.device, make: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    """Moves a module in place; parameters and buffers that were one tensor stay one tensor.

    `nn.Module.to` makes a new Parameter for each name on devices of another kind, which would untie tied weights, and
    lose hooks and attributes of parameters.

    Args:
      module: the module.
      device: where it goes.
      make: returns what is there for a tensor of the module; None copies it.
    """
    ties, before = _tied_names(module), dict(module.named_parameters(remove_duplicate=False))
    if make is None:
        module.to(device)
    else:
        module._apply(make)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        _take_over(parameter, before[name])
    for kind, names in ties:
        first = _lookup(module, kind, names[0])
        for name in names[1:]:
            owner, _, leaf = name.rpartition(".")
            getattr(module.get_submodule(owner), kind)[leaf] = first
    return module


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Gives parameters that modules register within the block a shape, and neither memory nor values.

    Buffers have both, as other tensors that a module computes with while it is built.
    """
    known: dict[int, tuple[weakref.ref[nn.Parameter], nn.Parameter]] = {}

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if type(parameter) is not nn.Parameter or parameter.is_meta or is_lazy(parameter):
            return None
        found = known.get(id(parameter))
        if found is None or found[0]() is not parameter:  # else it is tied
            found = known[id(parameter)] = weakref.ref(parameter), _without_memory(parameter)
        return found[1]

    handle = register_module_parameter_registration_hook(register)  # type: ignore[arg-type]  # it may return one
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")
            yield
    finally:
        handle.remove()


def copy_without_memory(module: nn.Module) -> nn.Module:
    """Returns a copy of a module whose parameters have neither memory nor values."""
    return copy.deepcopy(module, {id(parameter): _without_memory(parameter) for parameter in module.parameters()})


def _without_memory(parameter: nn.Parameter) -> nn.Parameter:
    made = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    _take_over(made, parameter)
    return made


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


def _lookup(module: nn.Module, kind: str, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), kind)[leaf]
