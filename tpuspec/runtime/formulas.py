"""Operations that torch_xla computes otherwise than torch, or on the host, by formulas of operations that it has right.

Each is registered for tensors of XLA devices only, above autograd, so that its gradient is that of the formula. They
hold for the whole process, also outside a Trainer; tensors of the CPU are not touched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

_KEY = "AutogradXLA"


@functools.lru_cache(maxsize=1)
def register_formulas() -> torch.library.Library:
    """Registers them once; they hold as long as the process."""
    library = torch.library.Library("aten", "IMPL")
    formulas: dict[str, Callable[..., object]] = {
        "batch_norm": _batch_norm, "vdot": _vdot, "_weight_norm": _weight_norm, "embedding_bag": _embedding_bag,
        "embedding_bag.padding_idx": _embedding_bag, "linalg_householder_product": _householder_product}
    for name, formula in formulas.items():
        library.impl(name, formula, _KEY)
    return library


def _batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
                running_var: Tensor | None, training: bool, momentum: float, eps: float, cudnn_enabled: bool) -> Tensor:
    """XLA's own keeps the biased variance, and has no backward in eval mode."""
    dims = [dim for dim in range(x.ndim) if dim != 1]
    shape = [1, x.shape[1], *[1] * (x.ndim - 2)]
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
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


def _vdot(one: Tensor, other: Tensor) -> Tensor:
    return ((one.conj() if one.is_complex() else one) * other).sum()


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
