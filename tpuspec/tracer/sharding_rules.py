"""Which dims of each parameter are split over which mesh axes: rules by name, and FSDP; arithmetic without devices."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from tpuspec.errors import ConfigError
from tpuspec.mesh import DATA_AXIS, PartitionSpec, format_mesh, parse_rule, splits_over_several


def shard_parameters(shapes: Mapping[str, tuple[int, ...]], axes: Mapping[str, int], *,
                     rules: Mapping[str, Any] | None, fsdp: bool) -> dict[str, PartitionSpec]:
    """Returns the partition of each parameter.

    Args:
      shapes: parameter name -> its shape.
      axes: mesh axis -> its size.
      rules: pattern of names, in which * matches any characters -> one entry a dim; the first one that matches counts.
      fsdp: whether parameters are split over 'data' besides, along their largest dim that it divides.

    Raises:
      ConfigError: a rule names an unknown axis, matches nothing, or does not fit the shape of what it matches; or
        FSDP finds nothing to split.
    """
    specs: dict[str, PartitionSpec] = {name: ((),) * len(shape) for name, shape in shapes.items()}
    taken: set[str] = set()
    for pattern, dims in (rules or {}).items():
        spec = parse_rule(pattern, dims, axes)
        matched = [name for name in shapes if fnmatchcase(name, pattern)]
        if not matched:
            near = difflib.get_close_matches(pattern, shapes, n=1) or list(shapes)[:3]
            raise ConfigError(f"sharding[{pattern!r}] matches no parameter of the model; it has {len(shapes)}"
                              + (f", such as {', '.join(near)}." if near else "."))
        if taken.issuperset(matched):
            raise ConfigError(f"sharding[{pattern!r}] has no effect: the rules before it match all of its parameters. "
                              "The first rule that matches counts; put the narrower one first.")
        for name in matched:
            if name not in taken:
                _check_fits(pattern, spec, name, shapes[name], axes)
                specs[name] = spec
        taken.update(matched)
    if fsdp:
        specs = {name: _split_over_data(spec, shapes[name], axes) for name, spec in specs.items()}
        if not any(DATA_AXIS in axis for spec in specs.values() for axis in spec):
            raise ConfigError(f"fsdp has nothing to split: no parameter has a dimension that {axes[DATA_AXIS]}, the "
                              f"size of the mesh axis {DATA_AXIS!r}, divides. Leave fsdp out.")
    return specs


def _check_fits(pattern: str, spec: PartitionSpec, name: str, shape: tuple[int, ...], axes: Mapping[str, int]) -> None:
    if len(spec) != len(shape):
        raise ConfigError(f"sharding[{pattern!r}] has {len(spec)} entries, one a dimension; it matches {name}, which "
                          f"has {len(shape)}: shape {list(shape)}.")
    for dim, (names, size) in enumerate(zip(spec, shape, strict=True)):
        parts = math.prod(axes[axis] for axis in names)
        if size % parts:
            raise ConfigError(f"sharding[{pattern!r}] splits dimension {dim} of {name}, shape {list(shape)}, in "
                              f"{parts} ({format_mesh({axis: axes[axis] for axis in names})}), which does not divide "
                              f"{size}.")


def _split_over_data(spec: PartitionSpec, shape: tuple[int, ...], axes: Mapping[str, int]) -> PartitionSpec:
    """Splits the largest whole dim that can be; a parameter that has none stays as it is."""
    # Besides a dim that is split over several axes, XLA's partitioner puts gradients in wrong places.
    if any(DATA_AXIS in names for names in spec) or splits_over_several(spec, axes):
        return spec
    num_parts = axes[DATA_AXIS]
    fitting = [dim for dim, size in enumerate(shape) if not spec[dim] and size and size % num_parts == 0]
    if not fitting:
        return spec
    largest = max(fitting, key=lambda dim: shape[dim])
    return tuple((DATA_AXIS,) if dim == largest else names for dim, names in enumerate(spec))
