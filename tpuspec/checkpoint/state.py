"""TrainingState: what a checkpoint holds, and how any tree of it splits into JSON and named tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tpuspec.checkpoint.tensors import DTYPE_NAMES
from tpuspec.errors import CheckpointError
from tpuspec.spec.pieces import Pieces

# safetensors keeps its own remarks under this name.
_RESERVED_NAME = "__metadata__"
_MAX_DEPTH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """All that a resumed run needs; every tensor is on the host.

    Attributes:
      global_step: completed updates.
      model: state dict of the module; empty where there is none. Here and in `optimizers` a tensor may be `Pieces`,
        where a process saves with others, or `StoredTensor`, as `read_stored` returns it.
      optimizers: optimizer name -> its state dict; '' names the only one.
      extra: any tree that `pack` takes: random state, the input position and the like.
      source: keeps what stored tensors are read from open within a `with` block.

    Raises:
      CheckpointError: `global_step` is no count, or `model` holds something else than tensors.
    """

    global_step: int
    model: dict[str, Any] = field(default_factory=dict)
    optimizers: dict[str, dict[str, Any]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    source: AbstractContextManager[Any] = field(default_factory=nullcontext)

    @property
    def has_pieces(self) -> bool:
        """Whether this process has less than the whole of some tensor."""
        return any(isinstance(leaf, Pieces) for leaf in pytree.tree_leaves([self.model, self.optimizers]))

    def __post_init__(self) -> None:
        step = self.global_step
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise CheckpointError(f"The global_step of a checkpoint must be an int >= 0; got {step!r}.")
        for name, value in self.model.items():
            if not isinstance(value, Tensor | Pieces) and not hasattr(value, "read"):
                raise CheckpointError(
                    f"A checkpoint holds the tensors of a model only; its state dict has {type(value).__name__} at "
                    f"{name!r}. Keep it in a buffer in place of get_extra_state, or leave it out in Scaffold.saver.")


def pack(tree: object, root: str = "tree") -> tuple[Any, dict[str, Any]]:
    """Splits a tree into what JSON can hold and the tensors, which it names by their place.

    Args:
      tree: any nesting of dict (keys int or str), list, tuple, None, bool, int, float, str, numpy scalar, host tensor
        and `Pieces`.
      root: what errors call the tree.

    Returns:
      The skeleton for `json.dumps`; tensor name -> contiguous tensor that shares memory with no other of them, but may
      share it with `tree`.

    Raises:
      CheckpointError: something else is in the tree; names its place.
    """
    tensors: dict[str, Any] = {}
    skeleton = _split(tree, (), tensors, root)
    return skeleton, storable_tensors(tensors, root)


def _split(tree: object, path: tuple[int | str, ...], tensors: dict[str, Any], root: str) -> Any:
    # Exact types: a subclass (a namedtuple, an enum) would come back as something else.
    kind = type(tree)
    if tree is None or kind in (bool, int, str):
        return tree
    if isinstance(tree, float) and kind is float:
        return tree if math.isfinite(tree) else {"float": repr(tree)}
    if isinstance(tree, Tensor | Pieces):
        name = _tensor_name(path, tensors)
        tensors[name] = tree
        return {"tensor": name}
    if isinstance(tree, np.generic) and type(tree.item()) in (bool, int, float, str):
        return _split(tree.item(), path, tensors, root)
    if len(path) < _MAX_DEPTH:
        if isinstance(tree, list) and kind is list:
            return [_split(value, (*path, i), tensors, root) for i, value in enumerate(tree)]
        if isinstance(tree, tuple) and kind is tuple:
            return {"tuple": [_split(value, (*path, i), tensors, root) for i, value in enumerate(tree)]}
        if isinstance(tree, dict) and kind is dict:
            for key in tree:
                if type(key) not in (int, str):
                    raise CheckpointError(f"The keys of a dict in a checkpoint must be int or str; got "
                                          f"{type(key).__name__} {key!r} in {_place(root, path)}.")
            # Pairs, for JSON makes every key a string.
            return {"dict": [[key, _split(value, (*path, key), tensors, root)] for key, value in tree.items()]}
    elif kind in (list, tuple, dict):
        raise CheckpointError(f"What a checkpoint holds may be nested {_MAX_DEPTH} deep; got more at "
                              f"{_place(root, path[:8])}... Does it hold itself?")
    raise CheckpointError(
        "A checkpoint holds dict, list, tuple, None, bool, int, float, str and tensors; got "
        f"{kind.__module__}.{kind.__qualname__} at {_place(root, path)}.")


def _place(root: str, path: tuple[int | str, ...]) -> str:
    return root + "".join(f"[{key!r}]" for key in path)


def _tensor_name(path: tuple[int | str, ...], taken: Mapping[str, Any]) -> str:
    name = ".".join(str(key) for key in path if key != "").encode("utf-8", "backslashreplace").decode()
    unique, number = name, 2
    while unique in taken or unique == _RESERVED_NAME:
        unique, number = f"{name}#{number}", number + 1
    return unique


def storable_tensors(tensors: Mapping[str, Any], root: str) -> dict[str, Any]:
    """Returns the tensors as safetensors wants them: contiguous, no two in the same memory.

    Args:
      tensors: name -> host tensor, or `Pieces`; tied weights may be the same one under two names.
      root: what errors call the tensors.

    Raises:
      CheckpointError: a tensor is not on the host, not dense, of a dtype that cannot be stored, or badly named.
    """
    result: dict[str, Any] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if isinstance(tensor, Pieces):  # each in memory of its own, as it came from the devices
            for piece in tensor.pieces:
                _check_storable(name, piece.tensor, root)
            result[name] = replace(tensor, pieces=tuple(
                replace(piece, tensor=piece.tensor.contiguous()) for piece in tensor.pieces))
            continue
        _check_storable(name, tensor, root)
        # A conjugate or negated view has a flag in place of the values; safetensors would store the values without it.
        value = tensor.detach().resolve_conj().resolve_neg().contiguous()
        if value.untyped_storage().data_ptr() in seen:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        result[name] = value
    return result


def _check_storable(name: str, tensor: Tensor, root: str) -> None:
    where = f"{root} tensor {name!r}"
    if name == _RESERVED_NAME:
        raise CheckpointError(f"A tensor in a checkpoint cannot be named {name!r}; rename it in {root}.")
    if tensor.device.type != "cpu":
        raise CheckpointError(f"Tensors must be on the host before they are saved; {where} is on {tensor.device}.")
    if tensor.layout != torch.strided:
        raise CheckpointError(f"Tensors must be dense to be saved; {where} is {tensor.layout}. Use to_dense().")
    if tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{where} has dtype {tensor.dtype}, which a checkpoint cannot hold; store it as another.")


def unpack(skeleton: Any, tensors: Mapping[str, Any]) -> Any:
    """Joins what `pack` split.

    Raises:
      CheckpointError: the skeleton is malformed, or a tensor that it names is missing.
    """
    if isinstance(skeleton, list):
        return [unpack(value, tensors) for value in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    match skeleton:
        case {"float": "nan" | "inf" | "-inf" as text}:
            return float(text)
        case {"tuple": list(values)}:
            return tuple(unpack(value, tensors) for value in values)
        case {"dict": list(pairs)} if all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            return {_checked_key(key): unpack(value, tensors) for key, value in pairs}
        case {"tensor": str(name)}:
            if name not in tensors:
                raise CheckpointError(f"The checkpoint is damaged: the tensor {name!r} is missing.")
            return tensors[name]
    raise CheckpointError(f"The checkpoint is damaged: it has an unknown entry {str(skeleton)[:80]}.")


def _checked_key(key: object) -> int | str:
    if isinstance(key, int | str):
        return key
    raise CheckpointError(f"The checkpoint is damaged: a dict has the key {str(key)[:80]}.")
