"""How a tensor within a step lies on a mesh, as an operation of its graph."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch_xla.experimental.stablehlo_custom_call import stablehlo_custom_call

from tpuspec.errors import SpecError
from tpuspec.mesh import format_mesh
from tpuspec.spec.engine import CONSTRAINT, CONSTRAINT_AXES


def constrained(tensor: Tensor, axes: Sequence[Any], mesh: Mapping[str, int]) -> Tensor:
    """Returns a tensor of the same values; its gradient is split likewise.

    Args:
      tensor: any shape.
      axes: for each dim an axis of the mesh, several, or None where it is whole.
      mesh: mesh axis -> its size.

    Raises:
      SpecError: an axis is not one of the mesh's, or stands there twice, or there are more or fewer entries than dims.
    """
    names = [[entry] if isinstance(entry, str) else list(entry or ()) for entry in axes]
    used = [name for of_dim in names for name in of_dim]
    if len(names) != tensor.ndim:
        raise SpecError(f"constrain takes an entry for each dim: got {list(axes)} for a tensor of shape "
                        f"{list(tensor.shape)}.")
    for name in used:
        if name not in mesh:
            raise SpecError(f"constrain names the axis {name!r}; the mesh has {format_mesh(mesh)}.")
        if used.count(name) > 1:
            raise SpecError(f"constrain names the axis {name!r} twice; an axis can split one dimension.")
    return _Constrained.apply(tensor, json.dumps(names))  # type: ignore[return-value]  # its stub knows no result


class _Constrained(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axes: str) -> Tensor:  # type: ignore[override]
        ctx.axes = axes
        return _call(tensor, axes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _call(gradient, ctx.axes), None


def _call(tensor: Tensor, axes: str) -> Tensor:
    result = stablehlo_custom_call([tensor], CONSTRAINT, [list(tensor.shape)], [tensor.dtype],
                                   frontend_attributes={CONSTRAINT_AXES: axes})
    assert isinstance(result, Tensor), "it has one output"
    return result
