"""Which axis of each tensor of the input holds the rows."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tpuspec.data.structure import Axes, map_named, named_leaves
from tpuspec.errors import ConfigError, ConfigTypeError
from tpuspec.spec.results import Batch

_FORMS = ("an int for every tensor; one int a tensor, those of features first; or (features, labels), each an int or "
          "nested like its tensors")


class BatchAxis:
    """The batch_axis argument of a Trainer.

    Args:
      given: None for axis 0 of every tensor; an int for every tensor; TPUEstimator's tuple of one int a tensor, those
        of features first; or (features, labels), each an int for all its tensors, or ints nested like them.
        Negative axes count from the last.

    Raises:
      ConfigTypeError: something in it is no int.
      ConfigError: it is empty.

    Source: batch_axis of TPUEstimator, which has the second form.
    """

    def __init__(self, given: Any = None) -> None:
        self._given = given
        if given is None:
            return
        leaves = pytree.tree_leaves(given)
        for axis in leaves:
            if not _is_axis(axis):
                raise ConfigTypeError(f"batch_axis must be {_FORMS}; got {axis!r} in it.")
        if not leaves:
            raise ConfigError(f"batch_axis must be {_FORMS}; got {given!r}.")

    @property
    def is_first(self) -> bool:
        """Whether it is axis 0 of every tensor, because nothing else was asked for."""
        return self._given is None

    def axes(self, batch: Batch) -> Axes:
        """Returns the axis of each tensor of a batch, by name.

        Raises:
          ConfigError: the argument does not fit the batch, or a tensor has no such axis; names it.
        """
        if self.is_first:
            return {}
        leaves = named_leaves(batch)
        return {name: _within(name, axis, leaves[name]) for name, axis in self._asked(batch, list(leaves)).items()}

    def _asked(self, batch: Batch, names: list[str]) -> dict[str, Any]:
        given = self._given
        if _is_axis(given):
            return dict.fromkeys(names, given)
        if isinstance(given, tuple | list) and all(map(_is_axis, given)):
            return self._one_a_tensor(batch, names)
        if not isinstance(given, tuple | list) or len(given) != 2:
            raise ConfigError(f"batch_axis must be {_FORMS}; got {given!r}.")
        asked: dict[str, Any] = {}
        for kind, tree, axes in (("features", batch.features, given[0]), ("labels", batch.labels, given[1])):
            if tree is None:  # as in PREDICT
                continue
            own = _paths(kind, tree)
            found = dict.fromkeys(own, axes) if _is_axis(axes) else _paths(kind, axes)
            if found.keys() != own.keys():
                raise ConfigError(f"batch_axis of {kind} must be an int or nested like them, {list(own)}; got "
                                  f"{axes!r}.")
            asked |= found
        return asked

    def _one_a_tensor(self, batch: Batch, names: list[str]) -> dict[str, Any]:
        given: Any = self._given
        # Where there are no labels, as in PREDICT, theirs are left over.
        if len(given) < len(names) or (len(given) > len(names) and batch.labels is not None):
            raise ConfigError(f"batch_axis must have an int for each tensor of the input, {names}; got {len(given)}: "
                              f"{given!r}.")
        asked = dict(zip(names, given, strict=False))
        if len(set(asked.values())) > 1 and _has_dict_of_several((batch.features, batch.labels)):
            raise ConfigError("batch_axis as one int a tensor is for tensors in an order, which a dict's have not; got "
                              f"{given!r} for {names}. Name them: batch_axis=({{'image': 3, 'mask': 2}}, 0).")
        return asked


def rows_to_axes(batch: Batch, axes: Axes) -> Batch:
    """Moves the rows of a batch that was collated along axis 0 to the axes where they are to be."""
    return map_named(batch, lambda name, tensor: torch.movedim(tensor, 0, axes.get(name, 0)))


def _paths(kind: str, tree: Any) -> dict[str, Any]:
    return {kind + pytree.keystr(path): leaf for path, leaf in pytree.tree_flatten_with_path(tree)[0]}


def _within(name: str, axis: int, tensor: Tensor) -> int:
    if not -tensor.ndim <= axis < tensor.ndim:
        raise ConfigError(f"batch_axis of {name} must be an axis of its shape, {list(tensor.shape)}; got {axis}.")
    return int(axis) % tensor.ndim


def _is_axis(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _has_dict_of_several(tree: Any) -> bool:
    found: list[bool] = []
    is_leaf: Callable[[Any], bool] = lambda node: bool(  # noqa: E731 - notes each node that is passed
        found.append(isinstance(node, Mapping) and len(node) > 1))
    pytree.tree_leaves(tree, is_leaf=is_leaf)
    return any(found)
