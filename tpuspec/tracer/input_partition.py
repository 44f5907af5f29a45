"""input_partition_dims: how each tensor of a batch is split over the cores of a replica; arithmetic without devices."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from tpuspec.errors import ConfigError
from tpuspec.spec.results import Batch

Dims = tuple[int, ...] | None
"""Number of parts of each dim; None for a tensor that is whole on every core of its replica."""


def partition_batch(partition_dims: Any, batch: Batch, num_cores: int) -> list[Dims]:
    """Returns how each tensor of a batch is split over the cores of a replica.

    Args:
      partition_dims: TPUConfig.input_partition_dims: for features, and where wanted for labels, the number of parts of
        each dim; None, or a dict or list of these, as the features are.
      batch: the batch.
      num_cores: cores of a replica.

    Returns:
      One item for each of `batch.tensors()`, in their order.

    Raises:
      ConfigError: the names, the nesting, the rank or the number of parts do not fit.

    Source: InputsStructureRecorder and _check_input_partition_dims of TPUEstimator.
    """
    feature_dims = partition_dims[0]
    label_dims = partition_dims[1] if len(partition_dims) > 1 else None
    _check_keys(0, "feature", feature_dims, batch.features)
    _check_keys(1, "label", label_dims, batch.labels)
    pairs = [*_pairs(0, "features", feature_dims, batch.features), *_pairs(1, "labels", label_dims, batch.labels)]
    return [_checked(dims, tensor, num_cores) for dims, tensor in pairs]


def _check_keys(place: int, kind: str, dims: Any, values: Any) -> None:
    if isinstance(dims, Mapping):
        keys, given = sorted(values) if isinstance(values, Mapping) else [], sorted(dims)
        if keys != given:
            raise ConfigError(f"TPUConfig.input_partition_dims[{place}] mismatched {kind} keys. Expected {keys}, got "
                              f"{given}.")


def _is_leaf(dims: Any) -> bool:
    return dims is None or (isinstance(dims, list | tuple) and all(
        isinstance(size, int) and not isinstance(size, bool) for size in dims))


def _pairs(place: int, kind: str, dims: Any, values: Any) -> Iterator[tuple[Any, Tensor]]:
    """Yields (dims, tensor), in the order of `Batch.tensors`."""
    if dims is None or isinstance(values, Tensor):
        if not _is_leaf(dims):
            raise _mismatch(place, kind, dims)
        for leaf in pytree.tree_leaves(values):
            if isinstance(leaf, Tensor):
                yield dims, leaf
    elif isinstance(values, Mapping) and isinstance(dims, Mapping) and set(values) == set(dims):
        for key, value in values.items():
            yield from _pairs(place, kind, dims[key], value)
    elif (isinstance(values, list | tuple) and isinstance(dims, list | tuple) and len(values) == len(dims)
          and not any(isinstance(item, int) for item in dims)):
        for item, value in zip(dims, values, strict=True):
            yield from _pairs(place, kind, item, value)
    elif values is not None:
        raise _mismatch(place, kind, dims)


def _mismatch(place: int, kind: str, dims: Any) -> ConfigError:
    return ConfigError(f"TPUConfig.input_partition_dims[{place}] mismatched the structure of {kind}. Give a list of "
                       f"numbers for each tensor, nested as the {kind} are, or None for all of them; got {dims!r}.")


def _checked(dims: Any, tensor: Tensor, num_cores: int) -> Dims:
    if dims is None:
        return None
    if any(size < 1 for size in dims):
        raise ConfigError(f"All input partition dims must be >= 1. Got {list(dims)}.")
    if math.prod(dims) == 1:
        return None
    if math.prod(dims) != num_cores:
        raise ConfigError("The product of each input partition dim should equal to num_cores_per_replica. (dim = "
                          f"{list(dims)}, num_cores_per_replica = {num_cores})")
    if len(dims) != tensor.ndim:
        raise ConfigError("Input partition dims must have the same number of dimensions as the `Tensor` to be "
                          f"partitioned. (tensor shape = {list(tensor.shape)}, input partition dims = {list(dims)}).")
    return tuple(dims)


def all_parts(partition_dims: Any) -> list[tuple[int, ...]]:
    """Returns each list of numbers of `input_partition_dims`."""
    if isinstance(partition_dims, dict):
        partition_dims = list(partition_dims.values())
    if not isinstance(partition_dims, list | tuple):
        return []
    if partition_dims and all(isinstance(size, int) for size in partition_dims):
        return [tuple(partition_dims)] if min(partition_dims) > 0 else []
    return functools.reduce(operator.iadd, map(all_parts, partition_dims), [])
