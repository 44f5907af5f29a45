"""Where each tensor of a step lies on the devices: what every replica has for itself, or by the rules of a mesh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from tpuspec.mesh import DATA_AXIS, PartitionSpec, check_batch_partitioner, cores_of
from tpuspec.spec.backend import Replica
from tpuspec.spec.engine import OWN, WHOLE, Layout
from tpuspec.spec.results import Batch
from tpuspec.tracer.input_partition import partition_batch
from tpuspec.tracer.slots import GRADIENT, Slot, is_own
from tpuspec.tracer.sources import Source


class Layouts(Protocol):
    """Layouts of the tensors of a step.

    Attributes:
      of_seed: of the random seed.
      of_output: of tensors for the host.
    """

    of_seed: Layout
    of_output: Layout

    def of_slots(self, slots: Sequence[Slot], tensors: Sequence[Tensor]) -> list[Layout]:
        """Returns those of the state."""
        ...

    def of_batch(self, batch: Batch) -> list[Layout]:
        """Returns those of a batch's tensors."""
        ...


def of_sources(layouts: Layouts, sources: Sequence[Source], values: Sequence[Tensor], batch: Sequence[Layout],
               ) -> list[Layout]:
    """Returns the layouts of a graph's inputs.

    Args:
      layouts: of the step.
      sources: where the inputs come from.
      values: of the inputs.
      batch: layouts of the batch's tensors.
    """
    places = [i for i, source in enumerate(sources) if source.kind == "slot"]
    of_state = layouts.of_slots([sources[i].key for i in places], [values[i] for i in places])
    of_slot = dict(zip(places, of_state, strict=True))
    return [of_slot[i] if source.kind == "slot" else batch[source.key] if source.kind == "batch" else
            layouts.of_seed if source.kind == "seed" else WHOLE for i, source in enumerate(sources)]


class ReplicaLayouts:
    """Every replica has its rows, seed, statistics and gradients for itself; weights are equal on all."""

    of_seed = of_output = OWN

    def of_slots(self, slots: Sequence[Slot], tensors: Sequence[Tensor]) -> list[Layout]:
        return [OWN if is_own(slot) else WHOLE for slot in slots]

    def of_batch(self, batch: Batch) -> list[Layout]:
        return [OWN] * len(batch.tensors())


class MeshLayouts:
    """Parameters lie as their rules say, gradients and optimizer state with them; rows are split over 'data'.

    Args:
      axes: mesh axis -> its size.
      replica: whose state it is.
      parameters: name -> the axes that split each dim.
      partition_dims: TPUConfig.input_partition_dims; None where a replica's rows are whole on each of its cores.
    """

    of_seed = of_output = WHOLE

    def __init__(self, axes: Mapping[str, int], replica: Replica, parameters: Mapping[str, PartitionSpec],
                 partition_dims: Any = None) -> None:
        self._rows = (DATA_AXIS,) if DATA_AXIS in axes else ()
        self._axes, self._num_cores = axes, cores_of(axes)
        self._replica, self._parameters, self._partition_dims = replica, parameters, partition_dims

    def of_slots(self, slots: Sequence[Slot], tensors: Sequence[Tensor]) -> list[Layout]:
        model = self._replica.model
        named = {} if model is None else {id(parameter): name for name, parameter in model.named_parameters()}
        owners = {name: [parameter for group in optimizer.param_groups for parameter in group["params"]]
                  for name, optimizer in self._replica.optimizers.items()} if any(
                      slot.kind == "optimizer" for slot in slots) else {}
        found = []
        for slot, tensor in zip(slots, tensors, strict=True):
            axes: PartitionSpec | None = None
            if slot.kind in ("parameter", GRADIENT) and not slot.key:
                axes = self._parameters.get(slot.name)
            elif slot.kind == "optimizer" and (owner := owners[slot.name][slot.place]).shape == tensor.shape:
                axes = self._parameters.get(named.get(id(owner), ""))
            found.append(Layout(axes=axes) if axes and any(axes) else WHOLE)
        return found

    def of_batch(self, batch: Batch) -> list[Layout]:
        """As `Layouts.of_batch`.

        Raises:
          ConfigError: input_partition_dims do not fit the batch, or are such as XLA gets wrong.
        """
        tensors = batch.tensors()
        parts = [None] * len(tensors) if self._partition_dims is None else partition_batch(
            self._partition_dims, batch, self._num_cores)
        if any(map(any, self._parameters.values())):
            for dims in {each for each in parts if each is not None}:
                check_batch_partitioner(dims, self._axes)
        return [Layout(parts=dims) if dims is not None else Layout(axes=(self._rows,)) if tensor.ndim else WHOLE
                for tensor, dims in zip(tensors, parts, strict=True)]
