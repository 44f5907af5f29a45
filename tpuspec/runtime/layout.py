"""Where each tensor lies on the devices of a mesh: parameters by rule, their state with them, batches by row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch_xla
import torch_xla.distributed.spmd as xs
from torch import Tensor

from tpuspec.mesh import DATA_AXIS, PartitionSpec, check_batch_partitioner
from tpuspec.runtime import graph
from tpuspec.runtime.input_partition import Dims, partition_batch
from tpuspec.runtime.slots import GRADIENT, Slot, read_slots
from tpuspec.spec.backend import Replica
from tpuspec.spec.results import Batch

_C = torch_xla._XLAC


class MeshLayout:
    """The layout of tensors on a mesh of devices, which all belong to this host.

    Args:
      axes: mesh axis -> its size; their product is the number of devices.
      partition_dims: TPUConfig.input_partition_dims; None where a replica's rows are whole on each of its cores.
    """

    def __init__(self, axes: Mapping[str, int], partition_dims: Any = None) -> None:
        self.axes = dict(axes)
        self._partition_dims = partition_dims
        num_devices = math.prod(axes.values())
        self._mesh = xs.Mesh(np.arange(num_devices), tuple(axes.values()), tuple(axes))
        self._num_replicas = axes.get(DATA_AXIS, 1)
        self._num_cores = num_devices // self._num_replicas
        self._core_meshes: dict[tuple[int, ...], xs.Mesh] = {}
        self._specs: dict[str, PartitionSpec] = {}
        self._texts: dict[PartitionSpec, str] = {}

    def set_parameters(self, specs: Mapping[str, PartitionSpec]) -> None:
        """Sets how each parameter of the model is split, by name."""
        self._specs = dict(specs)

    def settle(self, replica: Replica) -> None:
        """Moves every tensor of a replica's state to where it belongs, and leaves those that lie there."""
        device = str(replica.device)
        for slot, spec, tensor, is_pending in self._state(replica):
            if is_pending:
                graph.constrain(tensor, self._sharding(spec))
            elif slot.kind == GRADIENT or (text := graph.sharding_text(tensor)) == self._text(spec, device):
                continue
            elif text in _WHOLE:
                graph.constrain(tensor, self._sharding(spec))
            else:  # split in another way
                (value,) = self.fetch([tensor])
                (sent,) = graph.send([value], device, [self._sent(value, self._mesh, _flat(spec))])
                graph.publish(tensor, graph.inner(sent))

    def constrain(self, replica: Replica) -> None:
        """Within a trace: what the step computed of the state comes to lie where it belongs."""
        for _, spec, tensor, is_pending in self._state(replica):
            if is_pending:
                graph.constrain(tensor, self._sharding(spec))

    def whole(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Within a trace: returns copies that are whole on every device, so that fetching one needs no program."""
        copies = [tensor.detach().clone() if is_pending else graph.computed(tensor)
                  for tensor, is_pending in zip(tensors, graph.pending(tensors), strict=True)]
        for copy in copies:
            graph.constrain(copy, self._sharding(((),) * copy.ndim))
        return copies

    def send(self, batch: Batch, device: str) -> list[Tensor]:
        """Sends a batch of all replicas: the rows split over 'data', and within a replica by input_partition_dims.

        Raises:
          ConfigError: input_partition_dims do not fit the batch, or are such as XLA gets wrong.
        """
        tensors = batch.tensors()
        dims: list[Dims] = [None] * len(tensors)
        if self._partition_dims is not None:
            dims = partition_batch(self._partition_dims, batch, self._num_cores)
        return graph.send(tensors, device, [self._rows(tensor, split)
                                            for tensor, split in zip(tensors, dims, strict=True)])

    def fetch(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies tensors to the host; those that are split are put together there, from one copy of each part."""
        is_split = [graph.sharding_text(tensor) not in _WHOLE for tensor in tensors]
        whole = iter(graph.fetch([tensor for tensor, split in zip(tensors, is_split, strict=True) if not split]))
        return [_join(tensor) if split else next(whole) for tensor, split in zip(tensors, is_split, strict=True)]

    def _state(self, replica: Replica) -> Iterator[tuple[Slot, PartitionSpec, Tensor, bool]]:
        """Yields each tensor of the state with its partition, and whether it is pending."""
        slots = read_slots(replica)
        named = {} if replica.model is None else {
            id(parameter): self._specs.get(name) for name, parameter in replica.model.named_parameters()}
        owners = {name: [parameter for group in optimizer.param_groups for parameter in group["params"]]
                  for name, optimizer in replica.optimizers.items()}
        tensors = list(slots.values())
        for (slot, tensor), is_pending in zip(slots.items(), graph.pending(tensors), strict=True):
            spec = None
            if slot.kind in ("parameter", GRADIENT) and not slot.key:
                spec = self._specs.get(slot.name)
            elif slot.kind == "optimizer" and (owner := owners[slot.name][slot.place]).shape == tensor.shape:
                spec = named.get(id(owner))
            yield slot, ((),) * tensor.ndim if spec is None else spec, tensor, is_pending

    def _sharding(self, spec: PartitionSpec) -> Any:
        return self._mesh.get_op_sharding(_flat(spec))

    def _text(self, spec: PartitionSpec, device: str) -> str:
        """Returns how XLA names the sharding of a partition."""
        if spec not in self._texts:
            probe = torch.zeros([math.prod(self.axes[axis] for axis in names) for names in spec])
            (sent,) = graph.send([probe], device)
            graph.constrain(sent, self._sharding(spec))
            self._texts[spec] = graph.sharding_text(sent)
        return self._texts[spec]

    def _rows(self, tensor: Tensor, dims: Dims) -> Any:
        if dims is None:
            split = DATA_AXIS if DATA_AXIS in self.axes else None
            return self._sent(tensor, self._mesh, (split, *[None] * (tensor.ndim - 1)))
        if dims not in self._core_meshes:
            if any(map(any, self._specs.values())):
                check_batch_partitioner(dims, self.axes)
            # The devices of replica after replica, whatever the order of the axes.
            ids = np.arange(self._num_replicas * self._num_cores).reshape(tuple(self.axes.values()))
            if DATA_AXIS in self.axes:
                ids = np.moveaxis(ids, list(self.axes).index(DATA_AXIS), 0)
            self._core_meshes[dims] = xs.Mesh(ids.flatten(), (self._num_replicas, *dims))
        return self._sent(tensor, self._core_meshes[dims], ((0, 1), *range(2, tensor.ndim + 1)))

    def _sent(self, tensor: Tensor, mesh: xs.Mesh, spec: tuple[Any, ...]) -> Any:
        # Not xs.ShardingSpec: its own reckoning takes a tensor of fewer dims than the mesh has for fully split.
        return _C.XlaShardingSpec(tensor, *mesh._get_op_sharding_args(spec), False)


_WHOLE = ("", "{replicated}")


def _flat(spec: PartitionSpec) -> tuple[Any, ...]:
    """Returns a partition as torch_xla writes it."""
    return tuple(None if not names else names[0] if len(names) == 1 else names for names in spec)


def _join(tensor: Tensor) -> Tensor:
    joined = torch.empty(tensor.shape, dtype=tensor.dtype)
    seen: set[tuple[Any, ...]] = set()
    (shards,) = graph.local_shards([tensor])
    for index, values in shards:
        place = tuple((part.start, part.stop) for part in index)
        if place not in seen:
            seen.add(place)
            joined[index] = values[tuple(slice(0, part.stop - part.start) for part in index)]
    return joined
