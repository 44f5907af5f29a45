"""What torch's own optimizers need on XLA: the plain form of their update, which reads no device."""

from __future__ import annotations

import builtins
import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import _adafactor

from tpuspec.errors import ConfigError
from tpuspec.tracer import graph
from tpuspec.tracer.number_ops import NumberOps
from tpuspec.tracer.traced_numbers import MATH

_FLAGS = ("capturable", "foreach", "fused")
"""Other forms of the same update, for GPUs. On the CPU torch refuses the first; XLA fuses what the others do."""

_NUMBERS = frozenset({"step", "eta", "mu", "mu_product"})
"""Numbers in the state that torch keeps on the device in some forms, or moves there when it loads a state."""


def check_supported(optimizer: torch.optim.Optimizer) -> None:
    """Checks that XLA has what an optimizer needs.

    Raises:
      ConfigError: it needs what XLA does not have.
    """
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise ConfigError("SparseAdam needs sparse gradients, which XLA does not have. Take Adam, with "
                          "nn.Embedding(sparse=False), or train with use_tpu=False.")


def is_of_torch(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is one of torch.optim, or made of one."""
    return any(base.__module__.startswith("torch.optim") and base is not torch.optim.Optimizer
               for base in type(optimizer).__mro__)


def bring_home(optimizer: torch.optim.Optimizer) -> None:
    """Moves numbers that torch keeps on the device to the host, where its plain form computes with them."""
    if not is_of_torch(optimizer):
        return
    states = [state for state in optimizer.state.values() if isinstance(state, dict)]
    found = [(state, key, value) for state in states for key, value in state.items()
             if key in _NUMBERS and isinstance(value, Tensor)]
    found += [(group, key, value) for group in optimizer.param_groups for key, value in group.items()
              if isinstance(value, Tensor)]
    found = [item for item in found if item[2].device.type == "xla" and item[2].numel() == 1]
    for (holder, key, _), value in zip(found, graph.fetch([value for *_, value in found]), strict=True):
        holder[key] = value


@contextlib.contextmanager
def as_single_tensors(optimizer: torch.optim.Optimizer, ops: NumberOps) -> Iterator[None]:
    """Makes an optimizer take the plain form of its update within the block."""
    kept: list[tuple[dict[str, Any], str, Any]] = []
    own_math, items_stay = {name: getattr(math, name) for name in MATH}, ops.items_stay
    for name, (_, followed) in MATH.items():
        setattr(math, name, followed)
    is_adafactor = isinstance(optimizer, torch.optim.Adafactor)
    if is_of_torch(optimizer):
        kept += [(group, flag, group[flag]) for group in optimizer.param_groups for flag in _FLAGS if group.get(flag)]
    if is_adafactor:  # it reads norms, and takes the larger of two numbers
        ops.items_stay = True
        _adafactor.max = _larger  # type: ignore[attr-defined]
    for group, flag, _ in kept:
        group[flag] = False
    try:
        yield
    finally:
        for group, flag, value in kept:
            group[flag] = value
        ops.items_stay = items_stay
        if is_adafactor and not items_stay:
            del _adafactor.max  # type: ignore[attr-defined]
        for name, function in own_math.items():
            setattr(math, name, function)


def _larger(one: Any, other: Any) -> Any:
    """As max() of two numbers, of which the second may be on the device."""
    return other.clamp(min=one) if isinstance(other, Tensor) else builtins.max(one, other)
