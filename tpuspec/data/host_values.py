"""What features hold beside tensors: strings, None and mappings of other types than dict; and rows made a batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

from tpuspec.errors import InputError, InputTypeError

HostValues = dict[str, list[Any]]
"""By the key of features: one value a real row, which stays on the host."""


def plain_mappings(tree: Any) -> Any:
    """Returns a tree with a dict for each mapping that torch does not know, such as transformers' BatchEncoding."""
    if type(tree) is dict or (isinstance(tree, Mapping) and type(tree) not in pytree.SUPPORTED_NODES):
        return {key: plain_mappings(value) for key, value in tree.items()}
    kind = type(tree)
    return kind(map(plain_mappings, tree)) if kind is list or kind is tuple else tree


def take_host_values(element: Any) -> tuple[Any, HostValues]:
    """Splits what an input yields into what goes to the device, and the columns of strings of its features.

    A column is a list, a tuple or an array of one string, bytes or None for each row, in a dict of features.
    """
    element = plain_mappings(element)
    if type(element) in (list, tuple) and len(element) == 2:
        features, kept = _split(element[0])
        return type(element)((features, element[1])), kept
    return _split(element)


def _split(features: Any) -> tuple[Any, HostValues]:
    if not isinstance(features, dict):
        return features, {}
    kept = {key: list(value) for key, value in features.items() if _is_column(value)}
    if not kept or len(kept) == len(features):  # features of strings alone are an error, which names them
        return features, {}
    return {key: value for key, value in features.items() if key not in kept}, {
        str(key): values for key, values in kept.items()}


def _is_column(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        if value.ndim != 1 or value.dtype.kind not in "USO":
            return False
    elif type(value) not in (list, tuple):
        return False
    return len(value) > 0 and all(row is None or isinstance(row, str | bytes) for row in value)


def check_host_values(kept: HostValues, first: Iterable[str], num_rows: int) -> None:
    """Holds columns of strings against the rows of their batch, and against the columns of the first batch.

    Raises:
      InputError: names the column.
    """
    if changed := sorted(kept.keys() ^ set(first)):
        raise InputError(f"features[{changed[0]!r}] must hold strings or None in every batch, or in none.")
    for name, values in kept.items():
        if len(values) != num_rows:
            raise InputError(f"features[{name!r}] must have one string a row; got {len(values)} for {num_rows} rows.")


def native_array(name: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Returns an array in this machine's order of bytes, as torch takes it.

    Raises:
      InputTypeError: an array of strings, objects, or of numbers that torch does not have; names it.
    """
    if array.dtype.kind not in "biufc":
        raise InputTypeError(f"{name} must be an array of numbers or booleans; got dtype {array.dtype}. Encode "
                             "strings and objects as numbers in input_fn; a column of strings that only predict() is "
                             "to pass on stands in a dict of features, one a row.")
    if array.dtype.itemsize > (16 if array.dtype.kind == "c" else 8):
        smaller = "complex128" if array.dtype.kind == "c" else "float64"
        raise InputTypeError(f"{name} must be of a dtype that torch has; got {array.dtype}. Cast it in input_fn: "
                             f"array.astype('{smaller}').")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def collate_rows(rows: Sequence[Any]) -> Any:
    """Returns the batch of a Dataset's rows, as torch's default_collate; None is a value of its row.

    Raises:
      InputTypeError: rows that cannot be stacked; names the feature.
    """
    first = rows[0]
    if type(first) in (tuple, list) and len(first) == 2 and all(len(row) == 2 for row in rows):
        return [_collate(kind, [row[place] for row in rows]) for place, kind in enumerate(("features", "labels"))]
    return _collate("features", rows)


def _collate(name: str, rows: Sequence[Any]) -> Any:
    first = rows[0]
    if isinstance(first, Mapping):
        return {key: _collate(f"{name}[{key!r}]", [row[key] for row in rows]) for key in first}
    if any(row is None for row in rows):
        return list(rows)
    if isinstance(first, np.ndarray):
        rows = [native_array(name, row) if isinstance(row, np.ndarray) else row for row in rows]
    try:
        return default_collate(list(rows))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputTypeError(f"{name}: the rows of the Dataset cannot be stacked: {error}") from error
