"""Checks what input_fn yields: tensors by name, batch-major, and the same structure, shapes and dtypes every time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tpuspec.data.host_values import native_array, plain_mappings
from tpuspec.errors import InputError, InputTypeError
from tpuspec.spec.results import Batch

Rows = dict[str, tuple[tuple[int | str, ...], torch.dtype]]

Axes = Mapping[str, int]
"""The axis that holds the rows, by the name of a tensor; 0 where it is not named."""


def split_labels(element: Any) -> tuple[Any, Any]:
    """Splits what an input yields into (features, labels or None).

    A plain tuple is (features, labels), as is a list of two, which is what a DataLoader makes of pairs; any other list,
    a dict, a namedtuple or a tensor is features.

    Raises:
      InputError: a tuple of another length.
    """
    if isinstance(element, tuple) and not hasattr(element, "_fields"):
        if len(element) != 2:
            raise InputError("input_fn should return (features, labels) as a len 2 tuple; got a tuple of "
                             f"{len(element)}. Nest the parts: ((a, b), labels).")
        return element[0], element[1]
    if isinstance(element, list) and len(element) == 2:
        return element[0], element[1]
    return element, None


def to_host_batch(element: Any) -> Batch:
    """Turns what an input yields into a Batch of CPU tensors of the same nesting; None stays where it is.

    Raises:
      InputError: a tuple that is no pair, or no tensor at all.
      InputTypeError: a leaf is no tensor or array, or an array of objects or strings.
    """
    features, labels = split_labels(plain_mappings(element))
    batch = Batch(features=_convert("features", features),
                  labels=None if labels is None else _convert("labels", labels))
    if not Batch(features=batch.features).tensors():
        raise InputError("input_fn yielded features without any tensor.")
    return batch


def _convert(kind: str, tree: Any) -> Any:
    return pytree.tree_map_with_path(lambda path, leaf: _to_tensor(kind + pytree.keystr(path), leaf), tree)


def _to_tensor(name: str, leaf: Any) -> Tensor | None:
    if leaf is None:
        return None
    if isinstance(leaf, Tensor):
        if leaf.layout != torch.strided:
            raise InputTypeError(f"{name} must be a dense tensor; got {leaf.layout}. Call to_dense().")
        return leaf.detach() if leaf.device.type == "cpu" else leaf.detach().cpu()
    if isinstance(leaf, np.ndarray):
        leaf = native_array(name, leaf)
        return torch.from_numpy(leaf if leaf.flags.writeable and leaf.flags.c_contiguous else leaf.copy())
    mend = (f" Register the dataclass: torch.export.register_dataclass({type(leaf).__name__})."
            if dataclasses.is_dataclass(leaf) else
            " A column of strings, one a row, stands in a dict of features; predict() passes it on."
            if isinstance(leaf, str | bytes) else "")
    raise InputTypeError(f"{name} must be a tensor or an array [batch, ...]; got {type(leaf).__name__}.{mend}")


def named_leaves(batch: Batch) -> dict[str, Tensor]:
    """Returns every tensor by its name, such as "features['x']", features first."""
    named = {}
    for kind, tree in (("features", batch.features), ("labels", batch.labels)):
        if tree is not None:
            for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
                if leaf is not None:
                    named[kind + pytree.keystr(path)] = leaf
    return named


def map_named(batch: Batch, fn: Callable[[str, Tensor], Tensor]) -> Batch:
    """Returns a batch of the same nesting with `fn` applied to every name and tensor."""
    def map_tree(kind: str, tree: Any) -> Any:
        return pytree.tree_map_with_path(
            lambda path, leaf: None if leaf is None else fn(kind + pytree.keystr(path), leaf), tree)

    return Batch(features=map_tree("features", batch.features),
                 labels=None if batch.labels is None else map_tree("labels", batch.labels))


def count_rows(batch: Batch, axes: Axes | None = None) -> int:
    """Returns the rows of a batch: the size of axis 0, or that of `axes`, of every tensor.

    Raises:
      InputError: a scalar, or tensors of different numbers of rows; names the key.
    """
    leaves, axes = named_leaves(batch), axes or {}
    first_name = next(iter(leaves))
    num_rows: int | None = None
    for name, leaf in leaves.items():
        axis = axes.get(name, 0)
        if leaf.ndim <= axis:
            got = "a scalar" if leaf.ndim == 0 else f"shape {list(leaf.shape)}"
            rule = f"have its rows on axis {axis}" if axis else "be batch-major, [batch, ...]"
            raise InputError(f"{name} must {rule}; got {got}.")
        num_rows = leaf.shape[axis] if num_rows is None else num_rows
        if leaf.shape[axis] != num_rows:
            rule = f"have, on axis {axis}," if axis else "be batch-major with"
            raise InputError(f"{name} must {rule} the rows of {first_name}, {num_rows}; got shape "
                             f"{list(leaf.shape)}." + ("" if axes else " Rows on another axis need batch_axis."))
    assert num_rows is not None, "features have a tensor"
    return num_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchForm:
    """What must not change from batch to batch: names with shapes and dtypes, and the nesting.

    A shape has 'batch' in the place of the rows.
    """

    rows: Rows
    nesting: tuple[Any, Any]


class BatchChecker:
    """Holds the first batch's signature against each later one.

    Args:
      batch_size: rows a batch should have.
      exact: whether fewer rows are an error (train), rather than a batch to pad (eval, predict).
      may_be_empty: whether batches without rows may follow the last one with rows.
    """

    def __init__(self, *, batch_size: int, exact: bool, may_be_empty: bool = False) -> None:
        self._may_be_empty = may_be_empty
        self._batch_size = batch_size
        self._exact = exact
        self._first: BatchForm | None = None
        self._short: int | None = None

    def check(self, batch: Batch, axes: Axes | None = None) -> int:
        """Returns the number of rows of a batch.

        Args:
          batch: of host tensors.
          axes: where the rows are.

        Raises:
          InputError: not batch-major, too many or too few rows, rows after a short batch, or another structure, shape
            or dtype than the first batch's; names the key, old and new.
        """
        num_rows = count_rows(batch, axes)
        signature = BatchForm(
            rows={name: (_with_rows(leaf, (axes or {}).get(name, 0)), leaf.dtype)
                  for name, leaf in named_leaves(batch).items()},
            nesting=(pytree.tree_structure(batch.features), pytree.tree_structure(batch.labels)))
        if self._first is None:
            self._first = signature
        elif signature != self._first:
            raise InputError(_difference(self._first, signature))
        self._check_rows(num_rows)
        return num_rows

    def _check_rows(self, num_rows: int) -> None:
        if num_rows == 0 and self._may_be_empty:
            self._short = 0
            return
        if num_rows == 0:
            raise InputError("input_fn yielded a batch without rows.")
        if num_rows > self._batch_size:
            raise InputError(f"The real batch size should not be greater than batch_size, {self._batch_size}; got "
                             f"{num_rows} rows. Batch by params['batch_size'] in input_fn.")
        if num_rows < self._batch_size and self._exact:
            raise InputError(
                f"every training batch must have params['batch_size']={self._batch_size} rows; got {num_rows}. Batch "
                "by params['batch_size'], and drop a short last batch (drop_last=True).")
        if self._short is not None:
            raise InputError(f"only the last batch may be short of batch_size, {self._batch_size}; a batch of "
                             f"{num_rows} rows followed one of {self._short}.")
        if num_rows < self._batch_size:
            self._short = num_rows


def _difference(first: BatchForm, now: BatchForm) -> str:
    rule = "every batch must have the structure, shapes and dtypes of the first one"
    missing, added = sorted(first.rows.keys() - now.rows.keys()), sorted(now.rows.keys() - first.rows.keys())
    if missing or added:
        return f"{rule}; missing: {missing}, new: {added}."
    for name, (shape, dtype) in first.rows.items():
        new_shape, new_dtype = now.rows[name]
        if shape != new_shape:
            return (f"{rule}, [batch, ...] of static shape; {name} changed from [{_join(shape)}] to "
                    f"[{_join(new_shape)}]. Pad to one shape in input_fn.")
        if dtype != new_dtype:
            return f"{rule}; {name} changed from {dtype} to {new_dtype}."
    return f"{rule}; the nesting, or the order of a dict's keys, changed from {first.nesting} to {now.nesting}."


def _with_rows(tensor: Tensor, axis: int) -> tuple[int | str, ...]:
    return (*tensor.shape[:axis], "batch", *tensor.shape[axis + 1:])


def _join(shape: tuple[int | str, ...]) -> str:
    return ", ".join(map(str, shape))
