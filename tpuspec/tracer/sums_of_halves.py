"""Sums of bfloat16 and float16 values on XLA: they add up in float32, as torch does on a GPU.

torch_xla's own kernels add up in the dtype of the input. In bfloat16 a sum of ones then stays at 256.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Kernel = Callable[..., Any]

HALVES = (torch.bfloat16, torch.float16)


def _sum(own: Kernel, keys: Any, x: Tensor, *rest: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Halves are summed in float32: over several dims torch_xla's own sum stays at 256 in bfloat16."""
    if x.dtype not in HALVES or dtype not in (None, *HALVES):
        return own(keys, x, *rest, dtype=dtype)
    return own(keys, x, *rest, dtype=torch.float32).to(dtype or x.dtype)


def in_single(own: Kernel, keys: Any, x: Tensor, *rest: Any, **named: Any) -> Any:
    """Halves add up in float32; the outcome has the dtype that torch gives it."""
    if x.dtype not in HALVES:
        return own(keys, x, *rest, **named)
    floats = [one.dtype for one in (x, *rest) if isinstance(one, Tensor) and one.is_floating_point()]
    dtype = named.get("dtype") or functools.reduce(torch.promote_types, floats)
    if named.get("dtype") in HALVES:
        named["dtype"] = torch.float32
    found = own(keys, x.float(), *map(single, rest), **named)
    return found.to(dtype) if isinstance(found, Tensor) else tuple(one.to(dtype) for one in found)


def single(value: Any) -> Any:
    """Returns a half tensor in float32, and anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype in HALVES else value


def _in_single_in_place(name: str, own: Kernel, keys: Any, x: Tensor, *rest: Any, **named: Any) -> Tensor:
    if x.dtype not in HALVES:
        return own(keys, x, *rest, **named)
    return x.copy_(getattr(torch.ops.aten, name)(x, *rest, **named))


def _index_put(own: Kernel, keys: Any, x: Tensor, indices: Any, values: Tensor, accumulate: bool = False,
               *rest: Any) -> Tensor:
    if x.dtype not in HALVES or not accumulate:
        return own(keys, x, indices, values, accumulate, *rest)
    return x.copy_(own(keys, x.float(), indices, values.float(), accumulate, *rest))


def _convolution_backward(own: Kernel, keys: Any, gradient: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Any:
    """torch_xla's own sums a bias's gradient in bfloat16."""
    *settings, mask = rest
    if gradient.dtype not in HALVES or not mask[2]:
        return own(keys, gradient, x, weight, *rest)
    found = own(keys, gradient, x, weight, *settings, [*mask[:2], False])
    return found[0], found[1], torch.sum(gradient, [dim for dim in range(gradient.ndim) if dim != 1])


SUMS_OF_HALVES: dict[str, Kernel] = {
    **{name: in_single for name in (
        "index_add", "scatter_add", "scatter_reduce.two", "scatter.reduce", "_adaptive_avg_pool2d",
        "_adaptive_avg_pool3d", "var.correction", "std", "std.dim", "std.correction", "var_mean.correction",
        "std_mean.correction", "logsumexp", "norm.Scalar", "norm.ScalarOpt_dim", "embedding_dense_backward", "mse_loss",
        "smooth_l1_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits", "prod", "prod.dim_int")},
    **{name + "_": functools.partial(_in_single_in_place, name) for name in ("index_add", "scatter_add")},
    **dict.fromkeys(("sum", "sum.dim_IntList"), _sum), **dict.fromkeys(("_index_put_impl_", "index_put_"), _index_put),
    "convolution_backward_overrideable": _convolution_backward}
"""By the names of overloads in aten, as `kernels.MENDED`, which has the mean and the norm of vectors besides."""
