"""The named mesh of devices, and what the settings may say of it: its axes, and sharding rules by parameter name."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from tpuspec.errors import ConfigError

DATA_AXIS = "data"
MODEL_AXIS = "model"

PartitionSpec = tuple[tuple[str, ...], ...]
"""For each dim of a tensor the mesh axes that it is split over, major first; () for a dim that is whole everywhere."""


def check_mesh(mesh: object) -> dict[str, int] | None:
    """Returns a mesh setting as a plain dict of axis -> size.

    Raises:
      ConfigError: no mapping of names to positive ints.
    """
    if mesh is None:
        return None
    if not isinstance(mesh, Mapping) or not mesh:
        raise ConfigError(f"mesh must map names of axes to sizes, such as {{data: 2, model: 2}}; got {mesh!r}.")
    for axis, size in mesh.items():
        if not isinstance(axis, str) or not axis.isidentifier():
            raise ConfigError(f"an axis of the mesh must be a name such as 'data' or 'model'; got {axis!r}.")
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError(f"the size of the mesh axis {axis!r} must be a positive int; got {size!r}.")
    return dict(mesh)


def cores_of(mesh: Mapping[str, int]) -> int:
    """Returns the devices that share one replica: those along every axis but 'data'."""
    return math.prod(size for axis, size in mesh.items() if axis != DATA_AXIS)


def default_mesh(num_replicas: int, num_cores_per_replica: int) -> dict[str, int]:
    """Returns the mesh of settings that name none."""
    model = {MODEL_AXIS: num_cores_per_replica} if num_cores_per_replica > 1 else {}
    return {DATA_AXIS: num_replicas} | model


def format_mesh(mesh: Mapping[str, int]) -> str:
    """Returns a mesh as people write it: 'data: 2, model: 2'."""
    return ", ".join(f"{axis}: {size}" for axis, size in mesh.items())


def check_mesh_settings(mesh: Mapping[str, int] | None, *, num_shards: int | None, num_cores_per_replica: int | None,
                        sharding: Mapping[str, Any] | None, fsdp: object) -> None:
    """Checks the settings of SPMD against one another.

    Args:
      mesh: as `check_mesh` returned it; None where the settings name none.
      num_shards, num_cores_per_replica: as in TPUConfig.
      sharding: parameter-name pattern -> one entry a dim: an axis, a list of axes, or None.
      fsdp: whether parameters and optimizer state are split over 'data'.

    Raises:
      ConfigError: two settings contradict each other, or a rule names an axis that the mesh has not.
    """
    if not isinstance(fsdp, bool):
        raise ConfigError(f"fsdp must be True or False; got {fsdp!r}.")
    if mesh is not None:
        _check_counts(mesh, num_shards, num_cores_per_replica)
        if fsdp and mesh.get(DATA_AXIS, 1) == 1:
            raise ConfigError(f"fsdp splits parameters over the mesh axis {DATA_AXIS!r}, and the mesh "
                              f"({format_mesh(mesh)}) has one device there. Give that axis a size of 2 or more, or "
                              "leave fsdp out.")
    if sharding is None:
        return
    if not isinstance(sharding, Mapping) or not sharding:
        raise ConfigError("sharding must map patterns of parameter names to one mesh axis a dimension, such as "
                          f"{{'layers.*.weight': [model, null]}}; got {sharding!r}.")
    axes = mesh or default_mesh(1, num_cores_per_replica or 1)
    if MODEL_AXIS not in axes and mesh is None:
        raise ConfigError("sharding names axes of a mesh, and there is none. Set mesh={data: 2, model: 2}, or "
                          "num_cores_per_replica, which makes an axis 'model'.")
    for pattern, dims in sharding.items():
        parse_rule(pattern, dims, axes)


def check_partition_dims(dims: Any, *, is_per_host_v2: bool, knows_cores: bool) -> None:
    """Checks the outer form of input_partition_dims, in TPUEstimator's order.

    Raises:
      ConfigError: the first rule that is broken.
    """
    if dims is None:
        return
    if not isinstance(dims, list | tuple) or len(dims) not in (1, 2):
        raise ConfigError("input_partition_dims must be a list with one or two elements, for features and labels; "
                          f"got {dims!r}.")
    if not is_per_host_v2:
        raise ConfigError("input_partition_dims is only supported in PER_HOST_V2 mode. Set "
                          "per_host_input_for_training=PER_HOST_V2.")
    if not knows_cores:
        raise ConfigError("input_partition_dims requires setting num_cores_per_replica.")


def _check_counts(mesh: Mapping[str, int], num_shards: int | None, num_cores_per_replica: int | None) -> None:
    replicas, cores = mesh.get(DATA_AXIS, 1), cores_of(mesh)
    if num_shards is not None and num_shards != replicas:
        raise ConfigError(f"num_shards and the mesh axis {DATA_AXIS!r} both count replicas; got {num_shards} and the "
                          f"mesh ({format_mesh(mesh)}). Leave num_shards out.")
    if num_cores_per_replica is not None and num_cores_per_replica != cores:
        raise ConfigError(f"num_cores_per_replica={num_cores_per_replica} and the mesh ({format_mesh(mesh)}), which "
                          f"puts a replica on {cores} devices, contradict each other. Leave num_cores_per_replica out.")


def parse_rule(pattern: object, dims: object, axes: Mapping[str, int]) -> PartitionSpec:
    """Returns the partition that a sharding rule asks for.

    Raises:
      ConfigError: the rule is malformed, or names an axis that is unknown or was named before.
    """
    if not isinstance(pattern, str) or not pattern:
        raise ConfigError(f"a sharding rule needs a pattern of parameter names; got {pattern!r}.")
    if not isinstance(dims, list | tuple):
        raise ConfigError(f"sharding[{pattern!r}] must be a list with one entry a dimension: a mesh axis, a list of "
                          f"axes, or null; got {dims!r}.")
    parsed: list[tuple[str, ...]] = []
    for entry in dims:
        names = () if entry is None else (entry,) if isinstance(entry, str) else entry
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise ConfigError(f"sharding[{pattern!r}]: a dimension takes a mesh axis, a list of axes, or null; got "
                              f"{entry!r}.")
        parsed.append(tuple(names))
    used = [name for names in parsed for name in names]
    for name in used:
        if name not in axes:
            raise ConfigError(f"sharding[{pattern!r}] names the axis {name!r}; the mesh has {', '.join(axes)}.")
        if used.count(name) > 1:
            raise ConfigError(f"sharding[{pattern!r}] names the axis {name!r} twice; an axis can split one dimension.")
    check_partitioner(pattern, tuple(parsed), axes)
    if not used:
        raise ConfigError(f"sharding[{pattern!r}] splits no dimension, as every parameter without a rule. Leave it "
                          "out, or name a mesh axis.")
    return tuple(parsed)


def check_partitioner(pattern: str, spec: PartitionSpec, axes: Mapping[str, int]) -> None:
    """Refuses a partition of parameters that XLA gets wrong; `tests/spmd/layouts.py` searches for such.

    Raises:
      ConfigError: it splits one dim over several axes and another one too.
    """
    if _is_doubtful(spec, axes):
        raise ConfigError(f"sharding[{pattern!r}] splits one dimension over several axes and another one too; XLA's "
                          "partitioner was found to put gradients of such a parameter in wrong places. Split one.")


def check_batch_partitioner(dims: Sequence[int], axes: Mapping[str, int]) -> None:
    """Refuses a partition of a batch that XLA gets wrong beside parameters that are split.

    Args:
      dims: number of parts of each dim of a tensor over the cores of a replica.
      axes: of the mesh.

    Raises:
      ConfigError: it splits one dim over several axes and another one too; one axis of cores is no such case.
    """
    cores = {axis: size for axis, size in axes.items() if axis != DATA_AXIS and size > 1}
    if len(cores) > 1 and _is_doubtful(_batch_partition(dims, cores, axes.get(DATA_AXIS, 1)), axes):
        raise ConfigError(
            f"input_partition_dims={list(dims)} splits one dimension of a tensor over several axes of the mesh "
            f"({format_mesh(axes)}) and another one too, beside parameters that are split; XLA's partitioner was found "
            "to put gradients in wrong places there. Give the cores one axis "
            f"({MODEL_AXIS}: {math.prod(cores.values())}), split rows alone, or leave sharding and fsdp out.")


def _batch_partition(dims: Sequence[int], cores: Mapping[str, int], num_replicas: int) -> PartitionSpec:
    """Returns the axes that each dim is split over, wholly or in part; cores are numbered along their axes."""
    ends = list(itertools.accumulate(cores.values(), operator.mul))
    spec, start = [], 1
    for size in dims:
        end = start * size
        spec.append(tuple(axis for axis, axis_end in zip(cores, ends, strict=True)
                          if max(start, axis_end // cores[axis]) < min(end, axis_end)))
        start = end
    rows = (DATA_AXIS, *spec[0]) if num_replicas > 1 else spec[0]
    return (rows, *spec[1:])


def _is_doubtful(spec: PartitionSpec, axes: Mapping[str, int]) -> bool:
    num_split = sum(any(axes[axis] > 1 for axis in names) for names in spec)
    return num_split > 1 and splits_over_several(spec, axes)


def splits_over_several(spec: PartitionSpec, axes: Mapping[str, int]) -> bool:
    """Tells whether a dim is split over several axes; one of size 1 splits nothing."""
    return any(sum(axes[axis] > 1 for axis in names) > 1 for names in spec)
