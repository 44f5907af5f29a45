"""Where the inputs of a graph come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from tpuspec.errors import CaptureError
from tpuspec.tracer import graph

_MAX_DRAWS = 10_000


class Source(NamedTuple):
    """Where an input of a graph, or a tensor for the host, comes from.

    Attributes:
      kind: 'slot', 'batch', 'number', 'seed' or 'constant' for inputs; 'graph' or 'batch' for tensors for the host.
      key: the Slot; the number of the batch's tensor, optimizers' number, constant or output; of a seed how many draws
        came before it.
    """

    kind: str
    key: Any = None


class Sources:
    """What a step starts from, to find the inputs of its graphs in.

    Args:
      handles: slot -> the buffer that it starts with.
      numbers: slot -> its `tensor_id`.
      batch: its tensors.
      seed: of the step.
      of_optimizers: the buffers of the optimizers' numbers; it grows while the step is traced.
    """

    def __init__(self, handles: Mapping[Any, int], numbers: Mapping[Any, int], batch: Sequence[Tensor],
                 seed: int, of_optimizers: Sequence[int]) -> None:
        self.batch = {graph.tensor_id(tensor): Source("batch", i) for i, tensor in enumerate(batch)}
        self._by_number = {number: Source("slot", slot) for slot, number in numbers.items()} | self.batch
        self._by_handle = {handle: Source("slot", slot) for slot, handle in handles.items()}
        self._by_handle |= {handle: Source("batch", i) for i, handle in enumerate(graph.handles(batch))}
        self._seed, self._of_optimizers = seed, of_optimizers

    def of(self, found: graph.GraphInput) -> Source | None:
        """Returns where an input comes from; None for a constant."""
        if found.tensor_id == graph.seed_id():
            return Source("seed", self._seed_of(graph.read_seed(found.value)))
        # By the buffer where a tensor was read through another one that shares it.
        source = self._by_number.get(found.tensor_id) or self._by_handle.get(found.handle)
        if source is None and found.handle in self._of_optimizers:
            return Source("number", self._of_optimizers.index(found.handle))
        return source

    def _seed_of(self, value: int) -> int:
        """Returns after how many draws it is the seed: torch.utils.checkpoint goes back to an earlier draw.

        Raises:
          CaptureError: it comes from nowhere.
        """
        seed = self._seed
        for num_draws in range(_MAX_DRAWS):
            if seed == value:
                return num_draws
            seed = graph.seed_after_draw(seed)
        raise CaptureError("a step sets the random seed of its device. Set RunConfig.seed instead, or draw from a "
                           "tensor of the batch.")
