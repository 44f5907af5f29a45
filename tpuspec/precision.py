"""Which dtypes a run computes in: `RunConfig.precision`, and what it does to modules, batches and steps."""

from __future__ import annotations

import contextlib
import difflib
from enum import Enum

import torch
from torch import Tensor, nn

from tpuspec.errors import ConfigError


class Precision(Enum):
    """The dtypes of weights and computation; docs/precision.md has the table.

    Attributes:
      fp32: float32 throughout.
      bf16: bfloat16 throughout: weights, float buffers, batch, gradients, the optimizer's moments.
      bf16_mixed: float32 throughout, but for matrix products and convolutions, which torch.autocast runs in bfloat16.
    """

    fp32 = "fp32"
    bf16 = "bf16"
    bf16_mixed = "bf16-mixed"

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, float buffers, batch, gradients and the optimizer's moments."""
        return torch.bfloat16 if self is Precision.bf16 else torch.float32


_OTHER_NAMES = {
    "float32": "fp32", "f32": "fp32", "32": "fp32", "32-true": "fp32", "full": "fp32", "single": "fp32",
    "bfloat16": "bf16", "bf16-true": "bf16", "half": "bf16", "fp16": "bf16-mixed", "float16": "bf16-mixed",
    "16": "bf16-mixed", "16-mixed": "bf16-mixed", "fp16-mixed": "bf16-mixed", "mixed": "bf16-mixed",
    "amp": "bf16-mixed", "autocast": "bf16-mixed",
}
"""What other libraries call them, or the nearest that there is."""


def parse_precision(value: object) -> Precision | None:
    """Returns the Precision of a name; None leaves dtypes as the model and the input have them.

    Raises:
      ConfigError: no such name; suggests the nearest.
    """
    if value is None:
        return None
    try:
        return Precision(value)
    except ValueError:
        names = [precision.value for precision in Precision]
        asked = str(value).lower().replace("_", "-")
        near = [_OTHER_NAMES[asked]] if asked in _OTHER_NAMES else difflib.get_close_matches(asked, names, n=1)
        raise ConfigError(f"precision must be {', '.join(names)}, or None; got {value!r}."
                          + (f" Did you mean {near[0]!r}?" if near else "")) from None


def cast_module(module: nn.Module, precision: Precision | None) -> nn.Module:
    """Casts the float parameters and buffers of a host module in place; what its parts share stays shared.

    Raises:
      ConfigError: a parameter or buffer is complex, which bfloat16 has no form of.
    """
    if precision is None:
        return module
    if precision is Precision.bf16:
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_complex():
                raise ConfigError(f"precision=bf16 has no complex numbers, and {name} of the model is {tensor.dtype}. "
                                  "Take precision=bf16-mixed.")
    cast: dict[int, tuple[Tensor, Tensor]] = {}  # with the originals, so that no id comes twice

    def once(tensor: Tensor) -> Tensor:
        # Buffers are replaced, not changed: one that two modules share would be cast to two.
        if id(tensor) not in cast:
            cast[id(tensor)] = (tensor, cast_tensor(tensor, precision))
        return cast[id(tensor)][1]

    return module._apply(once)


def cast_tensor(tensor: Tensor, precision: Precision | None) -> Tensor:
    """Returns a float tensor in the precision's dtype, any other one as it is."""
    if precision is None or not tensor.is_floating_point():
        return tensor
    return tensor.to(precision.dtype)


def computing(precision: Precision | None, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Runs a block in which model_fn computes: under torch.autocast in bf16-mixed."""
    if precision is not Precision.bf16_mixed:
        return contextlib.nullcontext()
    # Its cache would keep casts of weights that an optimizer has changed since, where one step has several updates.
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)


def updating(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Runs a block in which an optimizer steps: in the dtypes of its parameters, also within `computing`."""
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def reduction_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which gradients of a dtype are summed over replicas: at least float32."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize else dtype


_NOT_IN_NUMPY = frozenset({torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz,
                           torch.float8_e5m2fnuz, torch.float8_e8m0fnu})


def for_host(tensor: Tensor) -> Tensor:
    """Returns a tensor in a dtype that numpy has: bfloat16 and float8 as float32, which holds each of their values."""
    return tensor.float() if tensor.dtype in _NOT_IN_NUMPY else tensor
