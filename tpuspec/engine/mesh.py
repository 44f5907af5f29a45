"""A mesh of devices: one program computes with the rows of all replicas, and XLA splits it as its tensors are split."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch
from jax import export
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torch import Tensor

from tpuspec.engine.arrays import host_array
from tpuspec.engine.collectives import over_mesh
from tpuspec.engine.devices import Several
from tpuspec.engine.executable import as_exported
from tpuspec.errors import ConfigError
from tpuspec.mesh import DATA_AXIS
from tpuspec.spec.engine import Layout


class DeviceMesh(Several):
    """Devices along named axes; `data` is the major one, so that a replica's devices are neighbours.

    Args:
      devices: of all processes.
      axes: mesh axis -> its size; their product is the number of devices.
      parts: into which the cores of a replica split dims of batches.

    Raises:
      ConfigError: no order of the cores serves all of `parts`.
    """

    batches_are_outputs = False

    def __init__(self, devices: Sequence[Any], axes: Mapping[str, int], parts: Sequence[Sequence[int]] = ()) -> None:
        super().__init__(devices)
        self.splits_state = not self._is_local
        self._num_rows = axes.get(DATA_AXIS, 1)
        cores = {axis: size for axis, size in axes.items() if axis != DATA_AXIS}
        self._pieces, sizes = _pieces_of(cores, parts)
        self._pieces[DATA_AXIS] = (DATA_AXIS,)
        self._ends = list(itertools.accumulate(sizes, operator.mul))
        names = [name for axis in cores for name in self._pieces[axis]]
        self._sizes = {DATA_AXIS: self._num_rows, **dict(zip(names, sizes, strict=True))}
        self._cores = names
        self._mesh = Mesh(np.array(devices).reshape(tuple(self._sizes.values())), tuple(self._sizes))

    def of_batches(self, batches: Sequence[Sequence[Tensor]], layouts: Sequence[Layout]) -> list[Any]:
        """Copies this process's rows into inputs of one run, each to the devices of its replica."""
        (tensors,) = batches
        arrays = [host_array(tensor) for tensor in tensors]
        if self._is_local:
            return self._send(arrays, layouts)
        num_processes = len({device.process_index for device in self._devices})
        return self._of_processes([self._whole(array, layout, self._num_rows // num_processes)
                                   for array, layout in zip(arrays, layouts, strict=True)], layouts, num_processes)

    def sums(self, arrays: Sequence[Any]) -> Tensor:
        """There is one of everything, which is nobody's own: nothing to compare, float32 [0, arrays, 2]."""
        return torch.zeros(0, len(arrays), 2)

    def _exported(self, program: bytes) -> export.Exported:
        return as_exported(over_mesh(program, self._spec_of_axes, self._sizes), self._platform)

    def _function(self, exported: export.Exported, given: Sequence[Layout], made: Sequence[Layout],
                  ) -> Callable[..., Any]:
        shapes = [tuple(aval.shape) for aval in exported.in_avals]

        def call(*inputs: Any) -> Any:
            return exported.call(*(self._without_padding(each, shape, layout)
                                   for each, shape, layout in zip(inputs, shapes, given, strict=True)))

        return call

    def _places(self, exported: export.Exported, made: Sequence[Layout], num_kept: int, *, stacked: bool = False,
                ) -> list[Any] | None:
        return [self._place(layout, stacked=stacked) for layout in made]

    def _place(self, layout: Layout, *, stacked: bool = False) -> Any:
        return NamedSharding(self._mesh, PartitionSpec(*([None] if stacked else []), *self._spec_of(layout)))

    def _spec_of(self, layout: Layout) -> list[tuple[str, ...]]:
        if layout.parts:
            return self._spec_of_parts(layout.parts)
        return self._spec_of_axes(layout.axes)

    def _spec_of_axes(self, axes: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
        return [tuple(piece for axis in names for piece in self._pieces[axis]) for names in axes]

    def _spec_of_parts(self, parts: Sequence[int]) -> list[tuple[str, ...]]:
        """Returns for each dim of a batch the pieces of axes that split it; the rows are split over `data` besides."""
        spec, start, end = [], 0, 1
        for size in parts:
            end *= size
            stop = self._ends.index(end) + 1 if end > 1 else 0
            spec.append(tuple(self._cores[start:stop]))
            start = stop
        return [(DATA_AXIS, *spec[0]), *spec[1:]]

    def _shape(self, shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
        """Returns the shape with parts of one size, of which the last ones are filled up."""
        if not layout.parts:
            return shape
        rows = shape[0] // self._num_rows
        filled = [math.ceil(size / num) * num
                  for size, num in zip((rows, *shape[1:]), layout.parts, strict=True)]
        return (filled[0] * self._num_rows, *filled[1:])

    def _whole(self, array: Any, layout: Layout, num_rows: int | None = None) -> Any:
        num_rows = num_rows or self._num_rows
        share = self._num_rows // num_rows
        filled = self._shape((array.shape[0] * share, *array.shape[1:]), layout) if array.ndim else array.shape
        if filled == (array.shape[0] * share if array.ndim else 1, *array.shape[1:]) or not array.ndim:
            return array
        by_row = np.asarray(array).reshape(num_rows, -1, *array.shape[1:])
        wanted = (num_rows, filled[0] // self._num_rows, *filled[1:])
        by_row = np.pad(by_row, [(0, new - old) for old, new in zip(by_row.shape, wanted, strict=True)])
        return by_row.reshape(-1, *filled[1:])

    def _without_padding(self, array: Any, shape: tuple[int, ...], layout: Layout) -> Any:
        if array.shape == shape:
            return array
        by_row = array.reshape(self._num_rows, -1, *array.shape[1:])
        by_row = by_row[:, :shape[0] // self._num_rows]
        array = by_row.reshape(-1, *array.shape[1:])[(slice(None), *(slice(size) for size in shape[1:]))]
        return jax.lax.with_sharding_constraint(array, self._place(layout))


def _pieces_of(cores: Mapping[str, int], parts: Sequence[Sequence[int]],
               ) -> tuple[dict[str, tuple[str, ...]], list[int]]:
    """Returns axis -> the axes that it is made of, and their sizes: each dim of a batch is split over whole ones."""
    own = set(itertools.accumulate(cores.values(), operator.mul))
    num_cores = math.prod(cores.values())
    fitting = [each for each in parts if math.prod(each) == num_cores]  # others are refused with the batch
    ends = sorted({end for each in fitting for end in itertools.accumulate(each, operator.mul)} | own)
    ends = [end for end in ends if end > 1]
    if any(end % start for start, end in itertools.pairwise(ends)):
        raise ConfigError(f"input_partition_dims {[list(each) for each in parts]} split the {max(ends)} cores of a "
                          "replica in ways that do not fit one another. Take powers of two, or the same numbers for "
                          "all tensors.")
    sizes = [end // start for start, end in itertools.pairwise([1, *ends])]
    pieces: dict[str, tuple[str, ...]] = {}
    start, end = 0, 1
    for axis, size in cores.items():
        end *= size
        stop = ends.index(end) + 1 if end > 1 else 0
        num = stop - start
        pieces[axis] = (axis,) if num == 1 else tuple(f"{axis}_{i}" for i in range(num))
        start = max(start, stop)
    return pieces, sizes
