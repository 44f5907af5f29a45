"""Kernels of XLA that torch_xla has otherwise than torch, mended below autograd: torch's own gradients stay.

Each mended kernel calls torch_xla's for what that has right. Below autograd torch_xla has no views: a kernel takes
copies (`select_copy`) in their place.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import torch_xla.core.xla_op_registry as xla_op_registry
from torch import Tensor

from tpuspec.errors import OperationError
from tpuspec.tracer.norms_and_losses import PLAIN_FORMS
from tpuspec.tracer.sums_of_halves import HALVES, SUMS_OF_HALVES, Kernel, in_single

_INTEGER_QUOTIENT = xla_op_registry.register("integer_quotient", lambda x, other: x / other)
"""XLA's own division of integers: torch_xla divides them as float32, which is exact up to 2**24 only."""

_FLOAT_OF_INTEGERS = (
    "acos", "acosh", "asin", "asinh", "atan", "atanh", "cos", "cosh", "erf", "erfc", "erfinv", "exp", "expm1", "log",
    "log10", "log1p", "log2", "reciprocal", "rsqrt", "sigmoid", "sin", "sinh", "sqrt", "tan", "tanh", "exp2", "sinc",
    "digamma", "lgamma", "i0", "logit")
"""Of integers and booleans torch's are in the default dtype, torch_xla's in the dtype of the input."""


@functools.lru_cache(maxsize=1)
def register_kernels() -> torch.library.Library:
    """Registers them once; they hold as long as the process."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        for name, kernel in kernels().items():
            library.impl(name, kernel, "XLA", with_keyset=True, allow_override=True)
    return library


def kernels() -> dict[str, Kernel]:
    """Returns the mended kernels by the names of overloads in aten; each takes the dispatch keys first."""
    return PLAIN_FORMS | {
        name: functools.partial(kernel, _own(name)) for name, kernel in MENDED.items() if _has(name)}


def _has(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "XLA")


def _own(name: str) -> Kernel:
    return torch.library.get_kernel(f"aten::{name}", "XLA").call_boxed


def _is_integral(x: Tensor) -> bool:
    return not x.is_floating_point() and not x.is_complex()


def _in_float(own: Kernel, keys: Any, x: Tensor, *rest: Any, **named: Any) -> Any:
    return own(keys, x.to(torch.get_default_dtype()) if _is_integral(x) else x, *rest, **named)


def _not_in_place(name: str, own: Kernel, keys: Any, x: Tensor, *rest: Any, **named: Any) -> Any:
    if _is_integral(x):
        raise RuntimeError(f"{name} of integers is of {torch.get_default_dtype()}, which cannot be written to a tensor "
                           f"of {x.dtype}. Call torch.{name}, not Tensor.{name}_.")
    return own(keys, x, *rest, **named)


def _accumulated(own: Kernel, keys: Any, x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """Integers are summed in int64."""
    wide = dtype or (torch.int64 if _is_integral(x) else x.dtype)
    return own(keys, x.to(wide), dim, dtype=wide)


def _trace(own: Kernel, keys: Any, x: Tensor) -> Tensor:
    return own(keys, x.to(torch.int64) if _is_integral(x) else x)


def _isneginf(own: Kernel, keys: Any, x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=torch.bool) if _is_integral(x) else own(keys, x)


def _linalg_svd(own: Kernel, keys: Any, x: Tensor, full_matrices: bool = False, compute_uv: bool = True, *,
                driver: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Each matrix by itself: torch_xla's own has other shapes for several, for none and for one row."""
    del driver
    if x.is_complex():
        raise OperationError("The singular values of a complex matrix are not on XLA. Take those of the real matrix "
                                  "torch.cat([torch.cat([a.real, -a.imag], -1), torch.cat([a.imag, a.real], -1)], -2), "
                                  "each of which comes twice, or leave this to the host (use_tpu=False).")
    batch, rows, columns = x.shape[:-2], *x.shape[-2:]
    size = min(rows, columns)
    wide = (rows, columns) if full_matrices else (size, size)
    if x.numel() == 0:
        eyes = [torch.eye(a, b, dtype=x.dtype, device=x.device).expand(*batch, a, b).clone()
                for a, b in ((rows, wide[0]), (wide[1], columns))]
        found = (eyes[0], torch.zeros(*batch, size, dtype=x.dtype, device=x.device), eyes[1])
    else:
        flat = x.reshape(-1, rows, columns)
        each = [own(keys, torch.select_copy(flat, 0, i), full_matrices, True) for i in range(flat.shape[0])]
        u, s, vh = (torch.stack([one[i] for one in each]) for i in range(3))
        found = (u.reshape(*batch, rows, wide[0]), s.reshape(*batch, size), vh.reshape(*batch, wide[1], columns))
    return found if compute_uv else (x.new_empty(0), found[1], x.new_empty(0))


def _linalg_inv_ex(own: Kernel, keys: Any, x: Tensor, *, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    """Complex ones as real ones of twice the size: torch_xla's own inverts another matrix."""
    if x.is_complex():
        size, (real, imaginary) = x.shape[-1], _parts(x)
        double = torch.cat([torch.cat([real, -imaginary], -1), torch.cat([imaginary, real], -1)], -2)
        both = own(keys, double, check_errors=check_errors)[0]
        left = torch.slice_copy(both, -1, 0, size)
        inverse = torch.complex(torch.slice_copy(left, -2, 0, size), torch.slice_copy(left, -2, size))
    else:
        inverse = own(keys, x, check_errors=check_errors)[0]
    return inverse, torch.zeros(x.shape[:-2], dtype=torch.int32, device=x.device)


def _native_batch_norm(own: Kernel, keys: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None,
                       running_mean: Tensor | None, running_var: Tensor | None, training: bool, momentum: float,
                       eps: float) -> Any:
    """torch_xla's own keeps the biased variance."""
    if not training or running_mean is None or running_var is None:
        return own(keys, x, weight, bias, running_mean, running_var, training, momentum, eps)
    found = own(keys, x, weight, bias, running_mean.clone(), running_var.clone(), training, momentum, eps)
    dims = [dim for dim in range(x.ndim) if dim != 1]
    wide, size = x.to(running_var.dtype), x.numel() // x.shape[1]
    for kept, new in ((running_mean, wide.mean(dims)), (running_var, wide.var(dims, correction=1 if size > 1 else 0))):
        kept.copy_(kept * (1 - momentum) + new * momentum)
    return found


def _div(own: Kernel, keys: Any, x: Any, other: Any) -> Tensor:
    """torch_xla's own declares the quotient real of complex tensors, and of one and a number."""
    x, other = _tensors(x, other)
    dtype = torch.result_type(x, other)
    if not dtype.is_complex:
        return own(keys, x, other)
    return _complex_quotient(x, other, dtype)


def _div_by_number(own: Kernel, keys: Any, x: Tensor, other: Any) -> Tensor:
    dtype = torch.result_type(x, other)
    if not dtype.is_complex:
        return own(keys, x, other)
    return _complex_quotient(x, torch.tensor(other), dtype)


def _complex_quotient(x: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    if other.is_complex():
        x, other = x.to(dtype) * torch.conj_physical(other.to(dtype)), _square(other.to(dtype))
    real, imaginary = _parts(x.to(dtype))
    return torch.complex(real / other, imaginary / other)


def _div_to_integer(own: Kernel, keys: Any, x: Any, other: Any, *, rounding_mode: str | None) -> Tensor:
    """torch_xla's own rounds a quotient to bfloat16 before it takes the integer below, and integers to float32."""
    is_zero = not isinstance(other, Tensor) and other == 0
    x, other = _tensors(x, other)
    dtype = torch.result_type(x, other)
    if rounding_mode is None:
        return torch.div(x, other)
    if not dtype.is_floating_point and not dtype.is_complex and dtype is not torch.bool:
        if is_zero:
            raise RuntimeError("ZeroDivisionError")  # as torch
        return _integer_quotient(x, other, dtype, is_floor=rounding_mode == "floor")
    if dtype not in HALVES:
        return own(keys, x, other, rounding_mode=rounding_mode)
    x, other = x.float(), other.float()
    quotient = x / other
    if rounding_mode == "trunc":
        return torch.trunc(quotient).to(dtype)
    rest = torch.fmod(x, other)
    whole = torch.round((x - rest) / other)
    below = torch.where((rest != 0) & ((rest < 0) != (other < 0)), whole - 1, whole)
    return torch.where(other == 0, quotient, below).to(dtype)


def _integer_quotient(x: Tensor, other: Tensor, dtype: torch.dtype, *, is_floor: bool) -> Tensor:
    device = x.device if x.device.type == "xla" else other.device
    shape = torch.broadcast_shapes(x.shape, other.shape)
    x, other = (torch.expand_copy(one.to(device=device, dtype=dtype), shape) for one in (x, other))
    quotient = _INTEGER_QUOTIENT(x, other)
    if not is_floor or dtype is torch.uint8:
        return quotient
    rest = x - quotient * other
    return torch.where((rest != 0) & ((rest < 0) != (other < 0)), quotient - 1, quotient)


def _floor_divide(own: Kernel, keys: Any, x: Any, other: Any) -> Tensor:
    del own, keys
    return torch.div(x, other, rounding_mode="floor")


def _matmul(own: Kernel, keys: Any, x: Tensor, other: Tensor) -> Tensor:
    """torch_xla's own multiplies integers as float32. A product and its sum are one loop for XLA."""
    if not _is_integral(x):
        return own(keys, x, other)
    if other.ndim == 1:  # a vector
        return (x * other).sum(-1, dtype=x.dtype)
    return (torch.unsqueeze_copy(x, -1) * torch.unsqueeze_copy(other, -3)).sum(-2, dtype=x.dtype)


def _addmm(own: Kernel, keys: Any, x: Tensor, one: Tensor, other: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    if not _is_integral(one):
        return own(keys, x, one, other, beta=beta, alpha=alpha)
    return x * int(beta) + torch.matmul(one, other) * int(alpha)


def _place_of_most(own: Kernel, keys: Any, x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """The place of the first NaN, if there is one: torch_xla's own passes them over."""
    if not x.is_floating_point() or x.ndim == 0:
        return own(keys, x, dim, keepdim)
    is_nan = torch.isnan(x).to(torch.int32)
    most = torch.amax(is_nan, list(range(x.ndim)) if dim is None else [dim], keepdim)
    return torch.where(most > 0, torch.argmax(is_nan, dim, keepdim), own(keys, x, dim, keepdim))


def _tensors(*operands: Any) -> tuple[Tensor, ...]:
    """Returns operands with a number, which is one where torch takes a tensor, in the dtype that it has there."""
    if all(isinstance(one, Tensor) for one in operands):
        return operands
    dtype = torch.result_type(*operands)
    return tuple(one if isinstance(one, Tensor) else torch.tensor(one, dtype=dtype) for one in operands)


def _parts(x: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.view_as_real_copy(x)
    return torch.select_copy(both, -1, 0), torch.select_copy(both, -1, 1)


def _square(x: Tensor) -> Tensor:
    real, imaginary = _parts(x)
    return real * real + imaginary * imaginary


def _abs(own: Kernel, keys: Any, x: Tensor) -> Tensor:
    return torch.hypot(*_parts(x)) if x.is_complex() else own(keys, x)


def _sgn(own: Kernel, keys: Any, x: Tensor) -> Tensor:
    if not x.is_complex():
        return own(keys, x)
    size = torch.hypot(*_parts(x))
    return x / torch.where(size == 0, torch.ones_like(size), size)


def _linalg_vector_norm(own: Kernel, keys: Any, x: Tensor, *rest: Any, **named: Any) -> Tensor:
    return in_single(own, keys, torch.hypot(*_parts(x)) if x.is_complex() else x, *rest, **named)


def _to_copy(own: Kernel, keys: Any, x: Tensor, **named: Any) -> Tensor:
    _refuse_dtype(named.get("dtype"))
    return own(keys, x, **named)


def _view_as_complex_copy(own: Kernel, keys: Any, x: Tensor) -> Tensor:
    if x.dtype is torch.float64:
        _refuse_dtype(torch.complex128)
    return own(keys, x)


def _copy_from(own: Kernel, keys: Any, x: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    if to.device.type == "xla":
        _refuse_dtype(x.dtype)
        _refuse_dtype(to.dtype)
    return own(keys, x, to, non_blocking)


def _refuse_dtype(dtype: torch.dtype | None) -> None:
    """complex128 comes without its imaginary parts, complex32 is silently another dtype."""
    if dtype in (torch.complex128, torch.complex32):
        raise OperationError(f"XLA has complex64 only; got {dtype}, whose imaginary parts would be lost. Take "
                             "complex64: x.to(torch.complex64); for torch.float_power of complex numbers, torch.pow.")


def _mean(own: Kernel, keys: Any, x: Tensor, *rest: Any, **named: Any) -> Tensor:
    if not x.is_complex():
        return in_single(own, keys, x, *rest, **named)
    total = torch.sum(x, *rest, **named)
    return total / (x.numel() // max(1, total.numel()))


def _tanh_backward(own: Kernel, keys: Any, gradient: Tensor, out: Tensor) -> Tensor:
    if out.is_complex():
        return gradient * torch.conj_physical(1 - out * out)
    return own(keys, gradient, out)


def _sigmoid_backward(own: Kernel, keys: Any, gradient: Tensor, out: Tensor) -> Tensor:
    if out.is_complex():
        return gradient * torch.conj_physical((1 - out) * out)
    return own(keys, gradient, out)


def _native_dropout_backward(own: Kernel, keys: Any, gradient: Tensor, mask: Tensor, scale: float) -> Tensor:
    return own(keys, gradient.to(torch.get_default_dtype()) if _is_integral(gradient) else gradient, mask, scale)


def _roll(own: Kernel, keys: Any, x: Tensor, *rest: Any, **named: Any) -> Tensor:
    """torch_xla's own ends the process where there is nothing to roll."""
    return own(keys, x, *rest, **named) if x.numel() else x.clone()


def _as_strided_scatter(own: Kernel, keys: Any, x: Tensor, source: Tensor, size: list[int], stride: list[int],
                        storage_offset: int | None = None) -> Tensor:
    """By places that the host counts: torch_xla's own takes strides in another order."""
    del own, keys
    places = torch.arange(x.numel()).as_strided(size, stride, storage_offset or 0).reshape(-1).to(x.device)
    return x.reshape(-1).index_copy(0, places, source.to(x.dtype).expand(size).reshape(-1)).reshape(x.shape)


def _arange(own: Kernel, keys: Any, start: Any, end: Any, step: Any = 1, *, out: Tensor) -> Tensor:
    """The host counts where bounds are rounded to the dtype: torch_xla rounds them before it counts."""
    if _is_integral(out) and (out.dtype is torch.uint8 or any(isinstance(one, float) for one in (start, end, step))):
        values = torch.arange(start, end, step, dtype=out.dtype)
        return out.resize_(values.shape).copy_(values)
    return own(keys, start, end, step, out=out)


MENDED: dict[str, Kernel] = {
    **{name: _in_float for name in _FLOAT_OF_INTEGERS},
    **{name + "_": functools.partial(_not_in_place, name) for name in _FLOAT_OF_INTEGERS},
    **SUMS_OF_HALVES, "argmax": _place_of_most, "argmin": _place_of_most,
    **dict.fromkeys(("mm", "bmm", "mv", "dot"), _matmul), "addmm": _addmm, "baddbmm": _addmm,
    "cumsum": _accumulated, "cumprod": _accumulated, "trace": _trace, "roll": _roll, "isneginf": _isneginf,
    "div.Tensor": _div, "div.Scalar": _div_by_number, "div.Tensor_mode": _div_to_integer,
    "div.Scalar_mode": _div_to_integer, "floor_divide": _floor_divide, "abs": _abs, "sgn": _sgn, "mean": _mean,
    "mean.dim": _mean, "linalg_vector_norm": _linalg_vector_norm, "_linalg_svd": _linalg_svd,
    "linalg_inv_ex": _linalg_inv_ex, "tanh_backward": _tanh_backward, "sigmoid_backward": _sigmoid_backward,
    "native_batch_norm": _native_batch_norm, "_native_batch_norm_legit": _native_batch_norm,
    "native_dropout_backward": _native_dropout_backward, "as_strided_scatter": _as_strided_scatter,
    "arange.start_out": _arange, "_to_copy": _to_copy, "view_as_complex_copy": _view_as_complex_copy,
    "_copy_from": _copy_from}
"""By the names of overloads in aten: each takes torch_xla's own kernel, the dispatch keys and the arguments."""
