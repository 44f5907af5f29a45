"""The devices that programs run on: one, or one for each replica; of this process, or of all that have joined."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch
from jax import export
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torch import Tensor

from tpuspec.engine.arrays import Buffers, fetch, fetch_pieces, host_array
from tpuspec.engine.collectives import over_replicas
from tpuspec.engine.executable import Form, as_exported, compile_loop, compile_step, has_convolutions, num_compiles
from tpuspec.spec.engine import OWN, WHOLE, Layout, Run
from tpuspec.spec.phase import in_phase
from tpuspec.spec.pieces import Pieces, Stored

_REPLICA = "replica"


class OneDevice:
    """One PJRT device; see `spec.engine.Engine` for the verbs.

    Args:
      devices: the first one is taken.
    """

    num_replicas = num_devices = 1
    batches_are_outputs = has_values = True
    splits_state = False

    def __init__(self, devices: Sequence[Any]) -> None:
        self._devices = list(devices)
        self._buffers = Buffers()
        # As jax.export names it; a device says 'gpu'.
        self._platform: str = "cuda" if devices[0].platform == "gpu" else devices[0].platform
        self._takes_host_arrays = self._platform == "cpu"

    @property
    def num_compiles(self) -> int:
        """Programs that this process has compiled."""
        return num_compiles()

    def put(self, tensors: Sequence[Tensor], layouts: Sequence[Layout] | None = None) -> list[Any]:
        """Copies host tensors to the devices; each replica gets its own copy of those that are its own."""
        arrays = [host_array(tensor) for tensor in tensors]
        return self._send(arrays, layouts or [WHOLE] * len(tensors))

    def put_numbers(self, numbers: Sequence[Any], dtypes: Sequence[torch.dtype]) -> list[Any]:
        """Copies numbers, or lists of them, into inputs that are whole."""
        tensors = [torch.tensor(number, dtype=dtype) for number, dtype in zip(numbers, dtypes, strict=True)]
        return [host_array(tensor) for tensor in tensors] if self._takes_host_arrays else self.put(tensors)

    def put_stacked(self, tensors: Sequence[Tensor]) -> list[Any]:
        """Copies host tensors of one replica, [1, ...]."""
        return self.put([tensor[0] for tensor in tensors])

    def of_batches(self, batches: Sequence[Sequence[Tensor]], layouts: Sequence[Layout]) -> list[Any]:
        """Copies the batch into inputs of one run."""
        (tensors,) = batches
        if self._takes_host_arrays:
            return self._buffers.copies(tensors)
        return self._send([host_array(tensor) for tensor in tensors], layouts)

    def of_steps(self, steps: Sequence[Sequence[Sequence[Tensor]]], layouts: Sequence[Layout],
                 ) -> tuple[list[Any], list[list[Any]]]:
        """Copies the batches of several steps into inputs of one run."""
        if self._takes_host_arrays:
            stacks = self._buffers.stacks([tensors for (tensors,) in steps])
            if stacks is not None:
                return stacks, [[stack[i] for stack in stacks] for i in range(len(steps))]
        of_each = [self.of_batches(batches, layouts) for batches in steps]
        return [self.stack(arrays) for arrays in zip(*of_each, strict=True)], of_each

    def own(self, values: Sequence[Any]) -> Any:
        """Returns an input that is every replica's own, of one number each."""
        return values[0]

    def stack(self, arrays: Sequence[Any]) -> Any:
        """Returns inputs of several steps as one, [len(arrays), ...]."""
        if all(isinstance(array, np.ndarray) for array in arrays):
            return np.stack(arrays)
        with jax.enable_x64(True):
            return jax.numpy.stack(list(arrays))

    def fetch(self, arrays: Sequence[Any]) -> list[Tensor]:
        """Copies arrays to the host."""
        return fetch(arrays, is_near=self._platform == "cpu")

    def fetch_whole(self, arrays: Sequence[Any]) -> list[Tensor]:
        """As `fetch`: there is one replica."""
        return self.fetch(arrays)

    def fetch_pieces(self, arrays: Sequence[Any]) -> list[Tensor | Pieces]:
        """Copies to the host what this process has of arrays."""
        return fetch_pieces(arrays)

    def put_stored(self, stored: Sequence[Stored], dtypes: Sequence[torch.dtype], layouts: Sequence[Layout],
                   ) -> list[Any]:
        """Reads from a checkpoint what the devices of this process take, and sends it there."""
        with jax.enable_x64(True):
            return [_of_stored(each, dtype, self._place(layout))
                    for each, dtype, layout in zip(stored, dtypes, layouts, strict=True)]

    def sums(self, arrays: Sequence[Any]) -> Tensor:
        """Returns the sums of values and of sizes of arrays, float32 [1, arrays, 2]."""
        return fetch([_sums(arrays)[None]])[0]

    def compile(self, program: bytes, donated: Sequence[int], given: Sequence[Layout], made: Sequence[Layout],
                num_kept: int = 0) -> Run:
        """Compiles a StableHLO program."""
        exported = self._exported(program)
        with in_phase("compile"), jax.enable_x64(True):
            return compile_step(self._function(exported, given, made), self._forms(exported, given), donated,
                                self._places(exported, made, num_kept))

    def compile_loop(self, program: bytes, num_steps: int, carried: Sequence[tuple[int, int]], stacked: Sequence[int],
                     given: Sequence[Layout], made: Sequence[Layout]) -> Run | None:
        """Compiles a loop of several steps; None on a CPU for convolutions, which have one thread within a loop there.

        They would be slower so, and have other last bits.
        """
        if self._platform == "cpu" and has_convolutions(program):
            return None
        exported = self._exported(program)
        with in_phase("compile"), jax.enable_x64(True):
            return compile_loop(self._function(exported, given, made), self._forms(exported, given), num_steps,
                                carried, stacked, len(made), self._places(exported, made, len(carried)),
                                self._places(exported, made, len(carried), stacked=True))

    def _exported(self, program: bytes) -> export.Exported:
        return as_exported(program, self._platform)

    def _function(self, exported: export.Exported, given: Sequence[Layout], made: Sequence[Layout],
                  ) -> Callable[..., Any]:
        return exported.call

    def _forms(self, exported: export.Exported, given: Sequence[Layout]) -> list[Form]:
        """Returns shape, dtype and place of each input."""
        return [Form(self._shape(tuple(aval.shape), layout), aval.dtype, self._place(layout),
                     self._place(layout, stacked=True))
                for aval, layout in zip(exported.in_avals, given, strict=True)]

    def _places(self, exported: export.Exported, made: Sequence[Layout], num_kept: int, *, stacked: bool = False,
                ) -> list[Any] | None:
        """Returns where each output lies; None where the program says it."""
        return None

    def _send(self, arrays: Sequence[Any], layouts: Sequence[Layout]) -> list[Any]:
        if not arrays:
            return []
        with jax.enable_x64(True):
            return jax.device_put(list(arrays), [self._place(layout) for layout in layouts])

    def _shape(self, shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
        """Returns the shape of an array that has a tensor of every replica."""
        return shape

    def _place(self, layout: Layout, *, stacked: bool = False) -> Any:
        return jax.sharding.SingleDeviceSharding(self._devices[0])


class Several(OneDevice):
    """Devices of one process or of several, each with a part of what is split."""

    _mesh: Mesh

    def __init__(self, devices: Sequence[Any]) -> None:
        super().__init__(devices)
        self.num_devices, self._takes_host_arrays = len(devices), False
        self._is_local = all(device.process_index == jax.process_index() for device in devices)

    def fetch(self, arrays: Sequence[Any]) -> list[Tensor]:
        """Copies arrays to the host; those that are split over processes are brought together, by all of them."""
        if self._is_local:
            return fetch(arrays)
        whole = iter(fetch([self._here(array) for array in arrays if not _is_split(array)]))
        # Those that are split one after the other: a device may have no room for all of them.
        return [fetch([self._here(array)])[0] if _is_split(array) else next(whole) for array in arrays]

    @functools.cached_property
    def _gather(self) -> Callable[[Any], Any]:
        return jax.jit(lambda array: array, out_shardings=NamedSharding(self._mesh, PartitionSpec()))

    def _here(self, array: Any) -> Any:
        if not isinstance(array, jax.Array) or array.is_fully_addressable:
            return array
        if _is_split(array):
            with jax.enable_x64(True):
                array = self._gather(array)
        return array.addressable_data(0)

    def _send(self, arrays: Sequence[Any], layouts: Sequence[Layout]) -> list[Any]:
        return self._to_places([self._whole(*each) for each in zip(arrays, layouts, strict=True)], layouts)

    def _to_places(self, arrays: Sequence[Any], layouts: Sequence[Layout]) -> list[Any]:
        """Sends to each device its part of arrays that every process has whole."""
        if self._is_local:
            return super()._send(arrays, layouts)
        with jax.enable_x64(True):
            return [jax.make_array_from_callback(array.shape, self._place(layout), array.__getitem__)
                    for array, layout in zip(map(np.asarray, arrays), layouts, strict=True)]

    def _whole(self, array: Any, layout: Layout) -> Any:
        """Returns the values of all replicas, from those of one."""
        return array

    def _of_processes(self, arrays: Sequence[Any], layouts: Sequence[Layout], num_parts: int) -> list[Any]:
        """Returns arrays of which each process has its part of the first dim."""
        with jax.enable_x64(True):
            return [jax.make_array_from_process_local_data(
                self._place(layout), array, (array.shape[0] * num_parts, *array.shape[1:]))
                for array, layout in zip(map(np.asarray, arrays), layouts, strict=True)]


class Replicas(Several):
    """A device for each replica. What each has for itself is an array [number of replicas, ...]."""

    def __init__(self, devices: Sequence[Any]) -> None:
        super().__init__(devices)
        self.num_replicas = len(devices)
        self.batches_are_outputs = self._is_local
        self._mesh = Mesh(np.array(devices), (_REPLICA,))
        self._local = [i for i, device in enumerate(devices) if device.process_index == jax.process_index()]
        self._sums: Callable[..., Any] | None = None

    def of_batches(self, batches: Sequence[Sequence[Tensor]], layouts: Sequence[Layout]) -> list[Any]:
        """Copies the batches of this process's replicas into inputs of one run, each to its device."""
        arrays = [np.stack([host_array(tensor) for tensor in tensors]) for tensors in zip(*batches, strict=True)]
        if not self._is_local:
            return self._of_processes(arrays, layouts, self.num_replicas // len(self._local))
        with jax.enable_x64(True):
            return jax.device_put(arrays, [self._place(layout) for layout in layouts])

    def own(self, values: Sequence[Any]) -> Any:
        """Returns an input that is every replica's own, of one number each."""
        array = np.stack(values)
        return array if self._is_local else self._to_places([array], [OWN])[0]

    def put_stacked(self, tensors: Sequence[Tensor]) -> list[Any]:
        """Copies host tensors [num_replicas, ...] to the devices, to each replica its own."""
        return self._to_places([host_array(tensor) for tensor in tensors], [OWN] * len(tensors))

    def fetch_whole(self, arrays: Sequence[Any]) -> list[Tensor]:
        """As `fetch`, for one replica: of what each has for itself the mean, or the first one's whole numbers."""
        return [_mean(tensor) if _is_own(array) else tensor
                for array, tensor in zip(arrays, self.fetch(arrays), strict=True)]

    def sums(self, arrays: Sequence[Any]) -> Tensor:
        """Returns the sums of values and of sizes for this process's replicas, float32 [replicas, arrays, 2]."""
        if self._sums is None:
            self._sums = jax.jit(jax.shard_map(
                lambda *arrays: _sums(arrays)[None], mesh=self._mesh, in_specs=PartitionSpec(),
                out_specs=PartitionSpec(_REPLICA), check_vma=False))
        return self.fetch([self._sums(*arrays)])[0][self._local]

    def _exported(self, program: bytes) -> export.Exported:
        return as_exported(over_replicas(program, self.num_replicas), self._platform)

    def _function(self, exported: export.Exported, given: Sequence[Layout], made: Sequence[Layout],
                  ) -> Callable[..., Any]:
        def of_replica(*inputs: Any) -> tuple[Any, ...]:
            outputs = exported.call(*(
                each[0] if layout.is_own else each for each, layout in zip(inputs, given, strict=True)))
            return tuple(each[None] if layout.is_own else each for each, layout in zip(outputs, made, strict=True))

        def specs(layouts: Sequence[Layout]) -> tuple[PartitionSpec, ...]:
            return tuple(PartitionSpec(_REPLICA) if layout.is_own else PartitionSpec() for layout in layouts)

        # Not checked: that what is not a replica's own is equal on all of them is what `loops.drift` looks after.
        return jax.shard_map(of_replica, mesh=self._mesh, in_specs=specs(given), out_specs=specs(made),
                             check_vma=False)

    def _places(self, exported: export.Exported, made: Sequence[Layout], num_kept: int, *, stacked: bool = False,
                ) -> list[Any] | None:
        if self._is_local:
            return None
        # What hosts read must be whole on each: the chief has the rows of all.
        return [self._place(layout if i < num_kept else WHOLE, stacked=stacked) for i, layout in enumerate(made)]

    def _shape(self, shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
        return (self.num_replicas, *shape) if layout.is_own else shape

    def _whole(self, array: Any, layout: Layout) -> Any:
        return np.broadcast_to(np.asarray(array), self._shape(array.shape, layout)) if layout.is_own else array

    def _place(self, layout: Layout, *, stacked: bool = False) -> Any:
        axes = [_REPLICA] if layout.is_own else []
        return NamedSharding(self._mesh, PartitionSpec(*([None] if stacked and axes else []), *axes))


def _of_stored(stored: Stored, dtype: torch.dtype, place: Any) -> Any:
    read: dict[tuple[tuple[int | None, int | None], ...], Any] = {}

    def part(index: tuple[slice, ...] | None) -> Any:
        assert index is not None
        key = tuple((each.start, each.stop) for each in index)
        if key not in read:  # several devices may have it
            read[key] = np.asarray(host_array(stored.read(index).to(dtype)))
        return read[key]

    return jax.make_array_from_callback(tuple(stored.shape), place, part)


def _is_split(array: Any) -> bool:
    """Whether no process has the whole."""
    return isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated


def _is_own(array: Any) -> bool:
    return isinstance(array, jax.Array) and isinstance(array.sharding, NamedSharding) and (
        _REPLICA in array.sharding.spec)


def _mean(tensor: Tensor) -> Tensor:
    """Returns the mean over the first dim, of whole numbers the first."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor[0].clone()
    wide = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
    return wide.mean(0).to(tensor.dtype)


def _sums(arrays: Sequence[Any]) -> Any:
    values = [jax.numpy.stack([each.real, each.imag]) if jax.numpy.iscomplexobj(each) else each for each in arrays]
    wide = [each.astype(jax.numpy.float32) for each in values]
    return jax.numpy.stack([jax.numpy.stack([each.sum(), abs(each).sum()]) for each in wide])
