"""Operations that torch composes of others, composed anew for XLA where torch_xla's own, or one of the parts, is wrong.

They stand above autograd, so that their gradients are those of the parts. `tpuspec/runtime/kernels.py` registers them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import decomposition_table

from tpuspec.errors import OperationError

Kernel = Callable[..., Any]


def composites() -> dict[str, Kernel]:
    """Returns them by the names of overloads in aten; each takes the dispatch keys first."""
    def own(name: str, key: str = "AutogradCPU") -> Kernel:
        return torch.library.get_kernel(f"aten::{name}", key).call_boxed

    mended = {name: functools.partial(composite, own(name)) for name, composite in COMPOSITES.items()}
    mended["einsum"] = functools.partial(_einsum, own("einsum", "AutogradXLA"), own("einsum"))
    return mended


def _einsum(own: Kernel, composite: Kernel, keys: Any, equation: str, operands: list[Tensor], *,
            path: list[int] | None = None) -> Tensor:
    """torch_xla's own has a wrong gradient where an operand is complex."""
    return (composite if any(one.is_complex() for one in operands) else own)(keys, equation, operands, path=path)


def _svd(own: Kernel, keys: Any, x: Tensor, some: bool = True, compute_uv: bool = True) -> tuple[Tensor, ...]:
    u, s, vh = torch.linalg.svd(x, full_matrices=not some)
    if compute_uv:
        return u, s, vh.mH
    rows, columns = x.shape[-2:]
    return x.new_zeros(*x.shape[:-2], rows, rows), s, x.new_zeros(*x.shape[:-2], columns, columns)


def _conj(own: Kernel, keys: Any, x: Tensor) -> Tensor:
    """A tensor of its own: torch_xla's views lose the mark that a tensor is to be conjugated."""
    return torch.conj_physical(x) if x.is_complex() else x


def _layer_norm(own: Kernel, keys: Any, x: Tensor, shape: list[int], weight: Tensor | None = None,
                bias: Tensor | None = None, eps: float = 1e-5, cudnn_enable: bool = True) -> Tensor:
    """torch_xla's own has no gradient for no rows."""
    if x.numel():
        return own(keys, x, shape, weight, bias, eps, cudnn_enable)
    out = x * weight if weight is not None else x * 1
    return out + bias if bias is not None else out


def _nll_loss(own: Kernel, keys: Any, x: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = 1,
              ignore_index: int = -100) -> Tensor:
    """torch_xla's own ends the process for one row without a batch."""
    if x.ndim != 1:
        return own(keys, x, target, weight, reduction, ignore_index)
    loss = own(keys, x.unsqueeze(0), target.reshape(1), weight, reduction, ignore_index)
    return loss if reduction else loss.reshape(target.shape)


def _chunk_cat(own: Kernel, keys: Any, tensors: list[Tensor], dim: int, num_chunks: int) -> Tensor:
    dim %= tensors[0].ndim
    padded = []
    for one in tensors:
        size = -(-one.shape[dim] // num_chunks)
        missing = [0, 0] * (one.ndim - 1 - dim) + [0, size * num_chunks - one.shape[dim]]
        wide = F.pad(one.long() if one.dtype is torch.bool else one, missing).to(one.dtype)
        padded.append(wide.reshape(*one.shape[:dim], num_chunks, -1))
    return torch.cat(padded, dim + 1)


def _upsample(own: Kernel, keys: Any, x: Tensor, size: list[int] | None, *rest: Any, name: str) -> Tensor:
    """torch_xla's own takes the quotient of the sizes for the scale, and cuts where uint8 is to be rounded."""
    scales = rest[-1]
    is_exact = scales is None or all(wide * scale == int(wide * scale) for wide, scale in zip(
        x.shape[2:], scales, strict=True))
    if x.dtype is torch.uint8 and name != "upsample_nearest2d":
        return (_upsample(own, keys, x.float(), size, *rest, name=name) + 0.5).floor().to(x.dtype)
    if is_exact:
        return own(keys, x, size, *rest)
    formula = decomposition_table[getattr(torch.ops.aten, name).vec]
    return formula(x, size, *rest)


def _istft(own: Kernel, keys: Any, *_: Any, **__: Any) -> NoReturn:
    raise OperationError("torch.istft would end the process on XLA. Build it of torch.fft.irfft and F.fold, or leave "
                         "it to the host (use_tpu=False).")


COMPOSITES: dict[str, Kernel] = {
    "svd": _svd, "conj": _conj, "layer_norm": _layer_norm, "nll_loss": _nll_loss, "_chunk_cat": _chunk_cat,
    "istft": _istft, **{f"{name}.vec": functools.partial(_upsample, name=name) for name in (
        "upsample_nearest2d", "upsample_bilinear2d")}}
"""Each takes torch's own composition, the dispatch keys and the arguments."""
