"""Operations that torch_xla computes otherwise than torch, or on the host, by formulas of operations that it has right.

Each is registered for tensors of XLA devices only, above autograd, so that its gradient is that of the formula. They
hold for the whole process, also outside a Trainer; tensors of the CPU are not touched.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import decomposition_table

from tpuspec.errors import OperationError
from tpuspec.tracer.attention import scaled_dot_product_attention
from tpuspec.tracer.sums_of_halves import HALVES, single

_KEY = "AutogradXLA"

_Own = Callable[..., Any]
"""Torch's own composition of an operation, which takes the dispatch keys first."""


@functools.lru_cache(maxsize=1)
def register_formulas() -> torch.library.Library:
    """Registers them once; they hold as long as the process."""
    library = torch.library.Library("aten", "IMPL")
    formulas: dict[str, Callable[..., object]] = {
        "batch_norm": _batch_norm, "vdot": _vdot, "_weight_norm": _weight_norm, "embedding_bag": _embedding_bag,
        "embedding_bag.padding_idx": _embedding_bag, "linalg_householder_product": _householder_product,
        "elu": _elu, "elu_": _elu_, "celu": _celu, "celu_": _celu_, "selu": _selu, "selu_": _selu_,
        "avg_pool2d": functools.partial(_avg_pool, num_dims=2), "avg_pool3d": functools.partial(_avg_pool, num_dims=3),
        "count_nonzero": _count_nonzero, "count_nonzero.dim_IntList": _count_nonzero, "norm.Scalar": _norm,
        "norm.ScalarOpt_dim": _norm, "norm.ScalarOpt_dtype": _norm, "norm.ScalarOpt_dim_dtype": _norm,
        "_pack_padded_sequence": _pack_padded_sequence,
        "linalg_svdvals": _svdvals, "nuclear_norm": _nuclear_norm, "nuclear_norm.dim": _nuclear_norm}
    for name, formula in formulas.items():
        library.impl(name, formula, _KEY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the override
        library.impl("randperm", _randperm, "XLA", allow_override=True)
        for name, composition in _compositions().items():
            library.impl(name, composition, _KEY, with_keyset=True, allow_override=True)
    return library


def _compositions() -> dict[str, Callable[..., Any]]:
    """Returns what calls torch's own composition for a part of its arguments; each takes the dispatch keys first."""
    def own(name: str, key: str = "AutogradCPU") -> Callable[..., Any]:
        return torch.library.get_kernel(f"aten::{name}", key).call_boxed

    found = {name: functools.partial(composition, own(name)) for name, composition in _COMPOSITIONS.items()}
    found["einsum"] = functools.partial(_einsum, own("einsum", _KEY), own("einsum"))
    return found


def _batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
                running_var: Tensor | None, training: bool, momentum: float, eps: float, cudnn_enabled: bool) -> Tensor:
    """XLA's own keeps the biased variance, and has no backward in eval mode."""
    dims = [dim for dim in range(x.ndim) if dim != 1]
    shape = [1, x.shape[1], *[1] * (x.ndim - 2)]
    wide = single(x)
    if training or running_mean is None or running_var is None:
        mean = wide.mean(dims)
        variance = (wide - mean.reshape(shape)).square().mean(dims)
        if training and running_mean is not None and running_var is not None:
            size = x.numel() // x.shape[1]
            with torch.no_grad():
                unbiased = variance.detach() * (size / max(1, size - 1))
                running_mean.mul_(1 - momentum).add_(mean.detach().to(running_mean.dtype) * momentum)
                running_var.mul_(1 - momentum).add_(unbiased.to(running_var.dtype) * momentum)
    else:
        mean, variance = running_mean, running_var
    scale = torch.rsqrt(variance + eps)
    if weight is not None:
        scale = scale * weight
    out = (wide - mean.reshape(shape)) * scale.reshape(shape)
    if bias is not None:
        out = out + bias.reshape(shape)
    return out.to(x.dtype)


def _randperm(n: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None, **_: Any) -> Tensor:
    """XLA's own draws from no seed. Of 2**31 keys hardly two are equal, and then the first stays before the second."""
    keys = torch.randint(0, 2**31 - 1, (n,), device=device)
    return torch.argsort(keys, stable=True).to(dtype or torch.int64)


def _pack_padded_sequence(x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """Takes the rows of [time, batch, ...] that are within the lengths, step by step.

    Raises:
      RuntimeError: lengths that torch refuses too.
    """
    if batch_first:
        x = x.transpose(0, 1)
    num_steps, num_rows, sizes = x.shape[0], x.shape[1], lengths.tolist()
    if len(sizes) != num_rows or min(sizes) <= 0 or max(sizes) > num_steps or sizes != sorted(sizes, reverse=True):
        raise RuntimeError(f"pack_padded_sequence needs one length of 1 to {num_steps} for each of {num_rows} rows, "
                           f"the longest first, or enforce_sorted=False; got {sizes}.")
    batch_sizes = [sum(size > step for size in sizes) for step in range(sizes[0])]
    rows = [step * num_rows + row for step, size in enumerate(batch_sizes) for row in range(size)]
    return (x.reshape(num_steps * num_rows, *x.shape[2:]).index_select(0, torch.tensor(rows).to(x.device)),
            torch.tensor(batch_sizes))


def _vdot(one: Tensor, other: Tensor) -> Tensor:
    return ((one.conj() if one.is_complex() else one) * other).sum(dtype=one.dtype)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    dims = list(range(v.ndim)) if dim == -1 else [i for i in range(v.ndim) if i != dim % v.ndim]
    norm = v.square().sum(dims, keepdim=True).sqrt()
    return v * (g / (norm.reshape(()) if dim == -1 else norm))


def _embedding_bag(weight: Tensor, indices: Tensor, offsets: Tensor, scale_grad_by_freq: bool = False, mode: int = 0,
                   sparse: bool = False, per_sample_weights: Tensor | None = None, include_last_offset: bool = False,
                   padding_idx: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums, means (mode 1) or maxima (mode 2) of the rows of each bag.

    Raises:
      NotImplementedError: settings that only hosts have.
    """
    if sparse or scale_grad_by_freq:
        raise NotImplementedError("EmbeddingBag on XLA has neither sparse=True nor scale_grad_by_freq=True. Leave them "
                                  "False.")
    size = indices.shape[0]
    num_bags = offsets.shape[0] - int(include_last_offset)
    starts = offsets[:num_bags].long()
    marks = torch.zeros(size + 1, dtype=torch.long, device=indices.device).index_add(0, starts, torch.ones_like(starts))
    bags = marks[:size].cumsum(0) - 1
    rows = weight.index_select(0, indices.reshape(-1).long())
    counted = torch.ones(size, dtype=weight.dtype, device=weight.device)
    if padding_idx is not None and padding_idx >= -weight.shape[0]:
        counted = (indices != padding_idx % weight.shape[0]).to(weight.dtype)
    if mode == 2:
        members = (bags == torch.arange(num_bags, device=bags.device)[:, None]) & (counted > 0)
        lowest = rows.masked_fill(~members[:, :, None], float("-inf")).amax(1) if size else rows.new_zeros(
            num_bags, weight.shape[1])
        out = torch.where(members.any(1, keepdim=True), lowest, torch.zeros_like(lowest))
    else:
        scaled = rows * counted[:, None]
        if per_sample_weights is not None:
            scaled = scaled * per_sample_weights.reshape(-1, 1)
        out = weight.new_zeros(num_bags, weight.shape[1]).index_add(0, bags, scaled)
        if mode == 1:
            sizes = counted.new_zeros(num_bags).index_add(0, bags, counted)
            out = out / sizes.clamp(min=1)[:, None]
    nothing = torch.empty(0, dtype=torch.long, device=indices.device)
    return out, bags, nothing, nothing


def _householder_product(reflectors: Tensor, tau: Tensor) -> Tensor:
    rows, columns = reflectors.shape[-2:]
    product = torch.eye(rows, columns, dtype=reflectors.dtype, device=reflectors.device)
    product = product.expand(*reflectors.shape[:-2], rows, columns)
    below = reflectors.tril(-1) + torch.eye(rows, columns, dtype=reflectors.dtype, device=reflectors.device)
    for i in reversed(range(tau.shape[-1])):
        v = below[..., :, i:i + 1]
        product = product - tau[..., i, None, None] * v @ (v.mH @ product)
    return product


def _elu(x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    """XLA's own gradient takes the input for the result."""
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    below = torch.expm1(torch.minimum(x, zero) * input_scale) * (alpha * scale)
    return torch.where(x > 0, x * scale, below)


def _elu_(x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    return x.copy_(_elu(x, alpha, scale, input_scale))


def _celu(x: Tensor, alpha: float = 1.0) -> Tensor:
    return _elu(x, alpha, 1.0, 1.0 / alpha)


def _celu_(x: Tensor, alpha: float = 1.0) -> Tensor:
    return x.copy_(_celu(x, alpha))


_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946


def _selu(x: Tensor) -> Tensor:
    return _elu(x, _SELU_ALPHA, _SELU_SCALE)


def _selu_(x: Tensor) -> Tensor:
    return x.copy_(_selu(x))


class _PlainPool(torch.autograd.Function):
    """Averages of whole windows, as XLA has them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: list[int], stride: list[int]) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.settings = (kernel, stride, [0] * len(kernel), False, True, None)
        with torch._C._AutoDispatchBelowAutograd():  # else it would come back here
            return _POOLS[len(kernel)][0](x, *ctx.settings)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        with torch._C._AutoDispatchBelowAutograd():
            return _POOLS[len(ctx.settings[0])][1](gradient, x, *ctx.settings), None, None


_POOLS = {2: (torch.ops.aten.avg_pool2d, torch.ops.aten.avg_pool2d_backward),
          3: (torch.ops.aten.avg_pool3d, torch.ops.aten.avg_pool3d_backward)}


def _avg_pool(x: Tensor, kernel_size: list[int], stride: list[int] = (), padding: list[int] = (0,),  # type: ignore[assignment]
              ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: int | None = None, *,
              num_dims: int) -> Tensor:
    """Pads by hand and divides by what torch counts: XLA's own is wrong with ceil_mode or divisor_override."""
    if not x.is_floating_point():
        raise OperationError(f"XLA has avg_pool{num_dims}d of floats only; got {x.dtype}. Take x.float().")
    if x.dtype in HALVES:
        return _avg_pool(x.float(), kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override,
                         num_dims=num_dims).to(x.dtype)

    def each(numbers: Any) -> list[int]:
        return list(numbers) * num_dims if len(numbers) == 1 else list(numbers)

    kernel, padding = each(kernel_size), each(padding)
    stride = each(stride) if stride else kernel
    sizes = x.shape[-num_dims:]
    pads: list[int] = []
    counts = torch.ones(())
    for size, width, step, pad in zip(sizes, kernel, stride, padding, strict=True):
        room = size + 2 * pad - width
        num = (-(-room // step) if ceil_mode else room // step) + 1
        if ceil_mode and (num - 1) * step >= size + pad:
            num -= 1  # a window must begin within the input or its left padding
        pads = [pad, max(0, (num - 1) * step + width - size - pad), *pads]
        starts = torch.arange(num) * step - pad
        ends = (starts + width).clamp(max=size + pad)
        if not count_include_pad:
            starts, ends = starts.clamp(min=0), ends.clamp(max=size)
        counts = counts.unsqueeze(-1) * (ends - starts)
    pooled = _PlainPool.apply(torch.nn.functional.pad(x, pads), kernel, stride)
    cut = [slice(0, num) for num in counts.shape]
    pooled = pooled[(..., *cut)]  # type: ignore[index]
    total = float(torch.tensor(kernel).prod())
    if divisor_override is not None:
        return pooled * (total / divisor_override)
    if bool((counts == total).all()):
        return pooled
    return pooled * (total / counts).to(x.dtype).to(x.device)


def _count_nonzero(x: Tensor, dim: list[int] | int | None = None) -> Tensor:
    counted = (x != 0).long()
    return counted.sum() if dim is None or dim == [] else counted.sum(dim)


def _norm(x: Tensor, p: float | None = 2, dim: list[int] | None = None, keepdim: bool = False, *,
          dtype: torch.dtype | None = None) -> Tensor:
    return torch.linalg.vector_norm(x, 2 if p is None else p, dim or None, keepdim, dtype=dtype)


def _svdvals(x: Tensor, *, driver: str | None = None) -> Tensor:
    """XLA's own drops dimensions of size 1, and is complex where the matrix is."""
    values = torch.linalg.svd(x, full_matrices=False).S
    return (values.real if values.is_complex() else values).reshape(*x.shape[:-2], min(x.shape[-2:]))


def _nuclear_norm(x: Tensor, dim: list[int] | bool = (-2, -1), keepdim: bool = False) -> Tensor:  # type: ignore[assignment]
    if isinstance(dim, bool):  # of the form without dimensions
        dim, keepdim = [-2, -1], dim
    first, second = (d % x.ndim for d in dim)
    norm = _svdvals(x.movedim((first, second), (-2, -1))).sum(-1)
    return norm.unsqueeze(min(first, second)).unsqueeze(max(first, second)) if keepdim else norm


def _einsum(own: _Own, composite: _Own, keys: Any, equation: str, operands: list[Tensor], *,
            path: list[int] | None = None) -> Tensor:
    """torch_xla's own has a wrong gradient where an operand is complex."""
    return (composite if any(one.is_complex() for one in operands) else own)(keys, equation, operands, path=path)


def _svd(own: _Own, keys: Any, x: Tensor, some: bool = True, compute_uv: bool = True) -> tuple[Tensor, ...]:
    u, s, vh = torch.linalg.svd(x, full_matrices=not some)
    if compute_uv:
        return u, s, vh.mH
    rows, columns = x.shape[-2:]
    return x.new_zeros(*x.shape[:-2], rows, rows), s, x.new_zeros(*x.shape[:-2], columns, columns)


def _conj(own: _Own, keys: Any, x: Tensor) -> Tensor:
    """A tensor of its own: torch_xla's views lose the mark that a tensor is to be conjugated."""
    return torch.conj_physical(x) if x.is_complex() else x


def _layer_norm(own: _Own, keys: Any, x: Tensor, shape: list[int], weight: Tensor | None = None,
                bias: Tensor | None = None, eps: float = 1e-5, cudnn_enable: bool = True) -> Tensor:
    """torch_xla's own has no gradient for no rows, and computes in bfloat16 where torch computes in float32."""
    if x.numel():
        found = own(keys, single(x), shape, single(weight), single(bias), eps, cudnn_enable)
        return found.to(x.dtype)
    out = x * weight if weight is not None else x * 1
    return out + bias if bias is not None else out


def _native_layer_norm(own: _Own, keys: Any, *given: Any) -> Any:
    """Torch's own autograd, over the kernels of `norms_and_losses`; torch_xla has neither."""
    return own(keys, *given)


def _group_norm(own: _Own, keys: Any, x: Tensor, num_groups: int, weight: Tensor | None = None,
                bias: Tensor | None = None, eps: float = 1e-5, cudnn_enabled: bool = True) -> Tensor:
    """torch_xla's own computes in bfloat16 where torch computes in float32."""
    return own(keys, single(x), num_groups, single(weight), single(bias), eps, cudnn_enabled).to(x.dtype)


def _nll_loss(own: _Own, keys: Any, x: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = 1,
              ignore_index: int = -100) -> Tensor:
    """torch_xla's own ends the process for one row without a batch."""
    if x.ndim != 1:
        return own(keys, x, target, weight, reduction, ignore_index)
    loss = own(keys, x.unsqueeze(0), target.reshape(1), weight, reduction, ignore_index)
    return loss if reduction else loss.reshape(target.shape)


def _chunk_cat(own: _Own, keys: Any, tensors: list[Tensor], dim: int, num_chunks: int) -> Tensor:
    dim %= tensors[0].ndim
    padded = []
    for one in tensors:
        size = -(-one.shape[dim] // num_chunks)
        missing = [0, 0] * (one.ndim - 1 - dim) + [0, size * num_chunks - one.shape[dim]]
        wide = F.pad(one.long() if one.dtype is torch.bool else one, missing).to(one.dtype)
        padded.append(wide.reshape(*one.shape[:dim], num_chunks, -1))
    return torch.cat(padded, dim + 1)


def _upsample(own: _Own, keys: Any, x: Tensor, size: list[int] | None, *rest: Any, name: str) -> Tensor:
    """torch_xla's own takes the quotient of the sizes for the scale.

    Raises:
      OperationError: uint8 is to be interpolated, which torch rounds by an arithmetic of its own.
    """
    scales = rest[-1]
    is_exact = scales is None or all(wide * scale == int(wide * scale) for wide, scale in zip(
        x.shape[2:], scales, strict=True))
    if x.dtype is torch.uint8 and name != "upsample_nearest2d":
        raise OperationError("XLA rounds a bilinear interpolation of uint8 otherwise than torch. Interpolate floats: "
                             "F.interpolate(x.float(), ...).round().to(torch.uint8).")
    if is_exact:
        return own(keys, x, size, *rest)
    formula = decomposition_table[getattr(torch.ops.aten, name).vec]
    return formula(x, size, *rest)


def _istft(own: _Own, keys: Any, *_: Any, **__: Any) -> NoReturn:
    raise OperationError("torch.istft would end the process on XLA. Build it of torch.fft.irfft and F.fold, or leave "
                         "it to the host (use_tpu=False).")


_COMPOSITIONS: dict[str, Callable[..., Any]] = {
    "svd": _svd, "conj": _conj, "layer_norm": _layer_norm,
    "native_layer_norm": _native_layer_norm, "group_norm": _group_norm, "nll_loss": _nll_loss,
    "scaled_dot_product_attention": scaled_dot_product_attention, "_chunk_cat": _chunk_cat, "istft": _istft,
    **{f"{name}.vec": functools.partial(_upsample, name=name) for name in (
        "upsample_nearest2d", "upsample_bilinear2d")}}
"""Each takes torch's own composition, the dispatch keys and the arguments."""
