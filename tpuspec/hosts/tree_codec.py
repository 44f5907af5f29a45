"""Trees as JSON and bytes: how tensors, arrays and plain values travel between hosts, without pickle."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tpuspec.errors import SpecTypeError

_ALIGNMENT = 16


def encode(tree: Any) -> tuple[Any, list[Tensor]]:
    """Splits a tree into a skeleton of JSON's types and its tensors, in order.

    Raises:
      SpecTypeError: a leaf or a key that cannot travel.
    """
    tensors: list[Tensor] = []
    return _split(tree, tensors), tensors


def _split(tree: Any, tensors: list[Tensor]) -> Any:
    if isinstance(tree, np.generic):
        tree = tree.item()
    if tree is None or isinstance(tree, bool | int | str):
        return tree
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else {"float": repr(tree)}
    if isinstance(tree, Tensor | np.ndarray):
        kind = "tensor" if isinstance(tree, Tensor) else "array"
        tensor = tree if isinstance(tree, Tensor) else torch.from_numpy(np.ascontiguousarray(tree).reshape(tree.shape))
        tensors.append(tensor.detach())
        return {kind: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]}
    if isinstance(tree, Mapping):
        if not all(isinstance(key, str | int) for key in tree):
            raise SpecTypeError(f"only dicts with keys of str or int travel between hosts; got {list(tree)[:3]}.")
        return {"dict": [[key, _split(value, tensors)] for key, value in tree.items()]}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        name = f"{type(tree).__module__}:{type(tree).__qualname__}"
        return {"namedtuple": [name, [_split(value, tensors) for value in tree]]}
    if isinstance(tree, tuple):
        return {"tuple": [_split(value, tensors) for value in tree]}
    if isinstance(tree, list):
        return [_split(value, tensors) for value in tree]
    raise SpecTypeError(f"a {type(tree).__name__} cannot travel between hosts: tensors, arrays, numbers and strings "
                        "can, in dicts, lists, tuples and namedtuples.")


def tensor_specs(skeleton: Any) -> list[tuple[torch.dtype, list[int]]]:
    """Returns dtype and shape of each tensor of a skeleton, in order."""
    if isinstance(skeleton, list):
        return [spec for item in skeleton for spec in tensor_specs(item)]
    if not isinstance(skeleton, dict):
        return []
    ((kind, value),) = skeleton.items()
    if kind in ("tensor", "array"):
        return [(getattr(torch, value[0]), value[1])]
    if kind == "dict":
        return [spec for _, item in value for spec in tensor_specs(item)]
    return tensor_specs(value[1] if kind == "namedtuple" else value)


def decode(skeleton: Any, tensors: Sequence[Tensor]) -> Any:
    """Joins what `encode` split."""
    rest = iter(tensors)

    def join(item: Any) -> Any:
        if isinstance(item, list):
            return [join(part) for part in item]
        if not isinstance(item, dict):
            return item
        ((kind, value),) = item.items()
        if kind == "tensor":
            return next(rest)
        if kind == "array":
            return next(rest).numpy()
        if kind == "float":
            return float(value)
        if kind == "dict":
            return {key: join(part) for key, part in value}
        if kind == "namedtuple":
            return _namedtuple(value[0])(*[join(part) for part in value[1]])
        return tuple(join(part) for part in value)

    return join(skeleton)


def _namedtuple(name: str) -> type:
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    try:
        for part in path.split("."):
            found = getattr(found, part)
    except AttributeError:
        found = None
    if not (isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_fields")):
        raise SpecTypeError(f"the namedtuple {path} cannot be found in module {module} on this host; define it at the "
                            "top of a module, so that every host has it by name.")
    return found


def num_bytes(specs: Sequence[tuple[torch.dtype, Sequence[int]]]) -> int:
    """Returns the length of what `to_bytes` makes of tensors of these dtypes and shapes."""
    return sum(_padded(math.prod(shape) * dtype.itemsize) for dtype, shape in specs)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def to_bytes(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Returns all tensors in one, uint8 [bytes], each aligned."""
    flat = torch.zeros(sum(_padded(t.numel() * t.element_size()) for t in tensors), dtype=torch.uint8, device=device)
    place = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if size:
            flat[place:place + size] = tensor.contiguous().reshape(-1).view(torch.uint8)
        place += _padded(size)
    return flat


def from_bytes(flat: Tensor, specs: Sequence[tuple[torch.dtype, Sequence[int]]]) -> list[Tensor]:
    """Returns the tensors that `to_bytes` joined; they own their memory."""
    tensors, place = [], 0
    for dtype, shape in specs:
        size = math.prod(shape) * dtype.itemsize
        tensors.append(flat[place:place + size].clone().view(dtype).reshape(list(shape)) if size
                       else torch.empty(list(shape), dtype=dtype, device=flat.device))
        place += _padded(size)
    return tensors
