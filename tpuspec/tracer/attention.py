"""Attention that keeps no matrix of [queries, keys] for the backward pass: it is computed again there.

Torch's own composition keeps two of them a layer, float32 and bfloat16 under autocast, which are most of what a
transformer's step reads and writes.

Source: the backward pass of FlashAttention (Dao et al., 2022), over whole rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tpuspec.tracer.sums_of_halves import single


def scaled_dot_product_attention(own: Callable[..., Any], keys: Any, q: Tensor, k: Tensor, v: Tensor,
                                 attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, *,
                                 scale: float | None = None, enable_gqa: bool = False) -> Tensor:
    """Takes torch's own composition, `own`, where there is dropout or a mask that learns, and for unusual shapes."""
    given, of_group = (q, k, v), (k, v)
    if torch.is_autocast_enabled("xla"):
        given = tuple(one.to(torch.get_autocast_dtype("xla")) if one.dtype is torch.float32 else one for one in given)
        of_group = given[1:]
    if enable_gqa and q.ndim > 2 and all(one.ndim == q.ndim and q.shape[-3] % one.shape[-3] == 0 for one in of_group):
        given = (given[0], *(one.repeat_interleave(q.shape[-3] // one.shape[-3], dim=-3) for one in of_group))
    if (dropout_p > 0 or not _are_plain(*given) or (attn_mask is not None and (attn_mask.requires_grad or is_causal))
            or torch._C._are_functorch_transforms_active()):
        return own(keys, q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return _Attention.apply(  # type: ignore[return-value]  # its stub knows no result
        own, keys, *given, attn_mask, is_causal, scale)


def _are_plain(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return (q.ndim > 2 and q.dtype == k.dtype == v.dtype and q.dtype.is_floating_point
            and q.shape[:-2] == k.shape[:-2] == v.shape[:-2] and min(q.numel(), k.numel(), v.numel()) > 0
            and q.shape[-1] == k.shape[-1] and k.shape[-2] == v.shape[-2])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Callable[..., Any], keys: Any, q: Tensor, k: Tensor, v: Tensor,  # type: ignore[override]
                mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
        with torch.autocast("xla", enabled=False):
            scores = _scores(q, k, mask, is_causal, scale)
            largest = scores.amax(-1, keepdim=True)
            if mask is not None:  # a row that sees nothing is 0, as torch's
                largest = largest.masked_fill(largest == -math.inf, 0.0)
            weights = torch.exp(scores - largest)
            total = weights.sum(-1, keepdim=True)
            logs = largest + torch.log(total)
            if mask is not None:
                total = total.masked_fill(total == 0, 1.0)
                logs = logs.masked_fill(logs == -math.inf, 0.0)
            out = _product("qk,kw->qw", (weights / total).to(v.dtype), v)
        ctx.save_for_backward(q, k, v, mask, logs, out)
        ctx.settings = own, keys, is_causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, mask, logs, out = ctx.saved_tensors
        own, keys, is_causal, scale = ctx.settings
        with torch.autocast("xla", enabled=False):
            if torch.is_grad_enabled():  # the gradient is to have one itself
                again = own(keys, q, k, v, mask, 0.0, is_causal, scale=scale)
                of_given = torch.autograd.grad(again, (q, k, v), gradient, create_graph=True, allow_unused=True)
                return None, None, *of_given, None, None, None
            weights = torch.exp(_scores(q, k, mask, is_causal, scale) - logs)
            of_weights = single(_product("qw,kw->qk", gradient, v))
            along = (single(gradient) * single(out)).sum(-1, keepdim=True)
            of_scores = (weights * (of_weights - along)).to(q.dtype)
            of_q = _product("qk,kw->qw", of_scores, k) * scale
            of_k = _product("qk,qw->kw", of_scores, q * scale)
            of_v = _product("qk,qw->kw", weights.to(v.dtype), gradient)
        return None, None, of_q, of_k, of_v, None, None, None


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """Returns [..., queries, keys], at least float32."""
    scores = single(_product("qw,kw->qk", q * scale, k))
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask


def _product(dims: str, one: Tensor, other: Tensor) -> Tensor:
    """Multiplies matrices, whose dims `dims` names: q of queries, k of keys, w of widths. Those before are all equal.

    matmul makes one dim of those before, and XLA fuses a product and what follows it only without a reshape between.
    """
    before = "abcdefgh"[:one.ndim - 2]
    first, last, made = dims.replace("->", ",").split(",")
    return torch.einsum(f"{before}{first},{before}{last}->{before}{made}", one, other)
