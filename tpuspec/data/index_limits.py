"""Labels and ids of the input against the sizes that model_fn indexes with them: XLA would clamp what is out of range.

The rehearsal shows which tensors of the batch reach an operation that indexes, as they are or through operations that
only choose, order or convert their values. Each later batch is checked on the host before it is sent.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tpuspec.data.structure import named_leaves
from tpuspec.errors import InputError
from tpuspec.spec.functions import user_place
from tpuspec.spec.results import Batch

_KEEPING = frozenset({
    "__getitem__", "chunk", "clone", "contiguous", "detach", "diagonal", "expand", "flatten", "flip", "float", "int",
    "long", "movedim", "moveaxis", "narrow", "permute", "ravel", "repeat", "reshape", "roll", "select", "split",
    "squeeze", "swapaxes", "swapdims", "t", "tensor_split", "tile", "to", "transpose", "type", "unbind", "unflatten",
    "unsqueeze", "view"})
"""Operations whose results hold only values of their first argument."""

_UNSIGNED = {torch.int64: np.uint64, torch.int32: np.uint32, torch.int16: np.uint16, torch.int8: np.uint8,
             torch.uint8: np.uint8}

_Derivation = tuple[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], "int | None"], ...]


class _Bounds(NamedTuple):
    """What an operation takes: low <= index < size, and `ignored`."""

    index: Any
    size: int
    told: str
    low: int = 0
    ignored: int | None = None


def _classes(input: Tensor, target: Any, weight: Any = None, size_average: Any = None, ignore_index: int = -100,
             *_: Any, **__: Any) -> list[_Bounds]:
    if not isinstance(target, Tensor) or target.is_floating_point():
        return []  # probabilities
    size = input.shape[1 if input.ndim > 1 else 0]
    return [_Bounds(target, size, f"has {size} classes", ignored=ignore_index)]


def _embedding(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> list[_Bounds]:
    return [_Bounds(input, weight.shape[0], f"has {weight.shape[0]} rows")]


def _torch_embedding(weight: Tensor, indices: Tensor, *_: Any, **__: Any) -> list[_Bounds]:
    return _embedding(indices, weight)


def _one_hot(tensor: Tensor, num_classes: int = -1) -> list[_Bounds]:
    return [_Bounds(tensor, num_classes, f"has {num_classes} classes")] if num_classes > 0 else []


def _along_dim(input: Tensor, dim: Any, index: Any = None, *_: Any, **__: Any) -> list[_Bounds]:
    if not isinstance(dim, int) or not input.ndim:
        return []
    return [_Bounds(index, input.shape[dim], f"chooses from {input.shape[dim]}")]


def _getitem(input: Tensor, index: Any) -> list[_Bounds]:
    found: list[_Bounds] = []
    for dim, part in enumerate(index if isinstance(index, tuple) else (index,)):
        if part is Ellipsis or part is None or isinstance(part, list | bool):
            break
        if isinstance(part, Tensor):
            if part.dtype in (torch.bool, torch.uint8) or part.is_floating_point():
                break
            found.append(_Bounds(part, input.shape[dim], f"chooses from {input.shape[dim]}", low=-input.shape[dim]))
    return found


_INDEXING: Mapping[Any, Callable[..., list[_Bounds]]] = {
    F.cross_entropy: _classes, F.nll_loss: _classes, F.embedding: _embedding, F.embedding_bag: _embedding,
    torch.embedding: _torch_embedding, F.one_hot: _one_hot, Tensor.__getitem__: _getitem,
    **{function: _along_dim for name in ("gather", "index_select", "index_add", "index_copy", "index_fill", "scatter",
                                         "scatter_add", "scatter_reduce")
       for function in (getattr(torch, name), getattr(Tensor, name), getattr(Tensor, f"{name}_", None)) if function}}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Limit:
    """What the values of one tensor must be.

    Attributes:
      number: of the tensor in the batch.
      name: of it, for messages.
      derivation: what is done to it first.
      low, size, ignored: low <= value < size, or the value is `ignored`.
      place: operation, FILE:LINE.
    """

    number: int
    name: str
    derivation: _Derivation
    low: int
    size: int
    ignored: int | None
    place: str

    def check(self, tensor: Tensor) -> None:
        """Raises InputError where a value is out of range."""
        if not tensor.numel():
            return
        if _are_within(tensor, self.low, self.size):
            return
        wrong = (tensor < self.low) | (tensor >= self.size)
        if self.ignored is not None:
            wrong &= tensor != self.ignored
        if not wrong.any():
            return
        place = tuple(wrong.nonzero()[0].tolist())
        ignored = "" if self.ignored is None or self.low <= self.ignored < self.size else f", or {self.ignored}"
        raise InputError(
            f"{self.name} hold {tensor[place].item()}, at {list(place)} of {list(tensor.shape)}, and {self.place}. The "
            f"values should be {self.low} to {self.size - 1}{ignored}: XLA would take another one without a word.")


@dataclass(slots=True, kw_only=True)
class IndexLimits:
    """What the tensors of each batch must be; empty until a batch was observed."""

    limits: list[_Limit] = field(default_factory=list)

    def observe(self, batch: Batch) -> TorchFunctionMode:
        """Returns a context in which model_fn shows what it indexes with the tensors of this batch."""
        return _Observer(named_leaves(batch), self.limits)

    def check(self, batches: Sequence[Batch]) -> None:
        """Checks the batches of replicas on the host.

        Raises:
          InputError: names the tensor, the value, its place, and the operation that takes it.
        """
        if self.limits:
            for batch in {id(batch): batch for batch in batches}.values():  # all replicas may have the same one
                self._check(batch)

    def _check(self, batch: Batch) -> None:
        tensors = batch.tensors()
        for limit in self.limits:
            if limit.number < len(tensors) and (tensor := _derive(tensors[limit.number], limit.derivation)) is not None:
                limit.check(tensor)


class _Observer(TorchFunctionMode):
    """Follows the tensors of a batch through model_fn."""

    def __init__(self, named: Mapping[str, Tensor], limits: list[_Limit]) -> None:
        super().__init__()
        self._names = list(named)
        # The tensors are kept: another one could have the id of one that is gone.
        self._known: dict[int, tuple[Tensor, int, _Derivation]] = {
            id(tensor): (tensor, number, ()) for number, tensor in enumerate(named.values())
            if tensor.dtype is not torch.bool and not tensor.is_complex()}
        self._limits = limits
        limits.clear()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (bounds_of := _INDEXING.get(func)) is not None:
            self._note(bounds_of, func, args, kwargs)
        result = func(*args, **kwargs)
        if args and (known := self._known.get(id(args[0]))) is not None:
            name = getattr(func, "__name__", "")
            if name in _KEEPING:
                self._follow(func, args, kwargs, result)
            elif name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__")):
                # Written in place, as by labels[labels < 0] = -100: no part of it holds the input's values for sure.
                self._known = {key: other for key, other in self._known.items() if other[1] != known[1]}
        return result

    def _note(self, bounds_of: Callable[..., list[_Bounds]], func: Callable[..., Any], args: Any, kwargs: Any) -> None:
        try:
            found = bounds_of(*args, **kwargs)
        except (TypeError, IndexError, AttributeError):
            return  # not a call that torch takes either
        for bounds in found:
            if (known := self._known.get(id(bounds.index))) is None:
                continue
            _, number, derivation = known
            limit = _Limit(
                number=number, name=self._names[number], derivation=derivation, low=bounds.low, size=bounds.size,
                ignored=bounds.ignored,
                place=f"{func.__name__.strip('_')} at {user_place(sys._getframe(2))} {bounds.told}")
            if limit not in self._limits:
                self._limits.append(limit)

    def _follow(self, func: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        _, number, derivation = self._known[id(args[0])]
        if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((args[1:], kwargs))):
            return
        several = isinstance(result, tuple | list)
        for place, tensor in enumerate(result if several else [result]):
            if not isinstance(tensor, Tensor) or tensor.dtype is torch.bool:
                continue
            step: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], int | None]
            if func.__name__ in ("to", "type", "float", "int", "long"):
                step = (Tensor.to, (tensor.dtype,), {}, None)
            else:
                step = (func, args[1:], kwargs, place if several else None)
            self._known[id(tensor)] = (tensor, number, (*derivation, step))


def _are_within(tensor: Tensor, low: int, size: int) -> bool:
    """Whether low <= value < size for all values."""
    if low == 0 and (unsigned := _UNSIGNED.get(tensor.dtype)) is not None:
        # In one pass, as negative numbers are large ones. numpy takes a third of the time of torch for a few labels.
        return bool(tensor.numpy().view(unsigned).max() < size)
    lowest, highest = torch.aminmax(tensor)
    return bool(lowest >= low and highest < size)


def _derive(tensor: Tensor, derivation: _Derivation) -> Tensor | None:
    """Does to a tensor of the host what model_fn does; None where it does not apply, to a batch of another shape."""
    try:
        for func, args, kwargs, place in derivation:
            result = func(tensor, *args, **kwargs)
            tensor = result if place is None else result[place]
    except (RuntimeError, IndexError, TypeError):
        return None
    return tensor
