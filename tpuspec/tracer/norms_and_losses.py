"""Layer norm and cross-entropy by few loops over their inputs: torch_xla has them by others' operations.

Its layer norm is a batch norm of one row, with weights of ones, and its cross-entropy multiplies matrices of ones and
zeros as large as the logits, several times over.
"""

from __future__ import annotations

from typing import Any

import torch
import torch_xla.core.xla_builder as xb
import torch_xla.core.xla_op_registry as xla_op_registry
from torch import Tensor

from tpuspec.tracer.sums_of_halves import single

_MEAN, _SUM = 1, 2
"""Torch's numbers of reductions."""

_COUNTED = xla_op_registry.register("counted", lambda like, *, sizes, dim: xb.Op.iota(
    like.builder(), xb.mkshape(xb.Type.S32, sizes), dim))
"""0, 1, 2, ... along a dim: torch_xla's own arange writes all of them into the program."""


def _native_layer_norm(keys: Any, x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None,
                       eps: float) -> tuple[Tensor, Tensor, Tensor]:
    wide, dims = single(x), _last_dims(shape)
    mean = wide.mean(dims, keepdim=True)
    centered = wide - mean
    scale = torch.rsqrt((centered * centered).mean(dims, keepdim=True) + eps)
    out = centered * scale
    out = out if weight is None else out * weight
    out = out if bias is None else out + bias
    return out.to(x.dtype), mean.to(x.dtype), scale.to(x.dtype)


def _native_layer_norm_backward(keys: Any, gradient: Tensor, x: Tensor, shape: list[int], mean: Tensor, scale: Tensor,
                                weight: Tensor | None, bias: Tensor | None, output_mask: list[bool],
                                ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    of_out, wide, mean, scale = single(gradient), single(x), single(mean), single(scale)
    dims, others = _last_dims(shape), list(range(x.ndim - len(shape)))
    out = (wide - mean) * scale
    of_x = of_weight = of_bias = None
    if output_mask[0]:
        of_normed = of_out if weight is None else of_out * weight
        along = (of_normed * out).mean(dims, keepdim=True)
        of_x = (scale * (of_normed - of_normed.mean(dims, keepdim=True) - out * along)).to(x.dtype)
    if output_mask[1] and weight is not None:
        of_weight = _summed(of_out * out, others).to(weight.dtype)
    if output_mask[2] and bias is not None:
        of_bias = _summed(of_out, others).to(bias.dtype)
    return of_x, of_weight, of_bias


def _last_dims(shape: list[int]) -> list[int]:
    return list(range(-len(shape), 0))


def _summed(x: Tensor, dims: list[int]) -> Tensor:
    return x.sum(dims) if dims else x  # torch takes no dims for all of them


def _nll_loss_forward(keys: Any, x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int,
                      ) -> tuple[Tensor, Tensor]:
    wide, zero = single(x), torch.zeros((), dtype=torch.float32, device=x.device)
    is_counted, chosen = _chosen(x, target, ignore_index)
    losses = -torch.where(chosen, wide, zero).sum(_classes(x))
    if weight is None:
        weights = is_counted.to(wide.dtype)
    else:
        weights = torch.where(chosen, _of_classes(single(weight), x), zero).sum(_classes(x))
        losses = losses * weights
    if reduction not in (_MEAN, _SUM):
        return losses.to(x.dtype), zero
    total, num = losses.sum(), weights.sum()
    return (total / num if reduction == _MEAN else total).to(x.dtype), num


def _nll_loss_backward(keys: Any, gradient: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, reduction: int,
                       ignore_index: int, total: Tensor) -> Tensor:
    of_loss, zero = single(gradient), torch.zeros((), dtype=torch.float32, device=x.device)
    _, chosen = _chosen(x, target, ignore_index)
    if reduction == _MEAN:
        of_loss = of_loss / single(total)
    if reduction not in (_MEAN, _SUM):
        of_loss = torch.unsqueeze_copy(of_loss, _classes(x))
    if weight is not None:
        of_loss = of_loss * _of_classes(single(weight), x)
    return torch.where(chosen, -of_loss, zero).expand(x.shape).to(x.dtype)


def _chosen(x: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Returns which rows count, and for each row which class is its own: none where it does not count."""
    dim, num_classes = _classes(x), x.shape[_classes(x)]
    target = target.long()
    is_counted = (target >= 0) & (target < num_classes) & (target != ignore_index)
    own = torch.where(is_counted, target, torch.full_like(target, -1)).to(torch.int32)
    sizes = [num_classes if each == dim else 1 for each in range(x.ndim)]
    return is_counted, _COUNTED(own, sizes=sizes, dim=dim) == torch.unsqueeze_copy(own, dim)


def _classes(x: Tensor) -> int:
    """Returns the dim of classes: of [rows, classes] or [rows, classes, height, width]."""
    return min(1, x.ndim - 1)


def _of_classes(value: Tensor, x: Tensor) -> Tensor:
    return value.reshape([-1 if dim == _classes(x) else 1 for dim in range(x.ndim)])


PLAIN_FORMS = {
    "native_layer_norm": _native_layer_norm, "native_layer_norm_backward": _native_layer_norm_backward,
    **dict.fromkeys(("nll_loss_forward", "nll_loss2d_forward"), _nll_loss_forward),
    **dict.fromkeys(("nll_loss_backward", "nll_loss2d_backward"), _nll_loss_backward)}
"""By the names of overloads in aten: each takes the dispatch keys and the arguments."""
