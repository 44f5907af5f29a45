"""Tensors of a module that lie in one piece of memory, which devices do not keep."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from tpuspec.errors import ConfigError


def check_memory(module: nn.Module) -> None:
    """Checks that no two tensors of a module lie in one piece of memory, as views do, unless they are one tensor.

    Raises:
      ConfigError: on a device each would have memory of its own, and they would no longer be tied.
    """
    seen: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.device.type == "cpu" and tensor.numel():
            seen.setdefault(id(tensor), (name, tensor))
    by_storage: dict[int, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in seen.values():
        by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
    for group in by_storage.values():
        for (name, tensor), (other, tied) in _meeting(group):
            if _overlap(tensor, tied):
                raise ConfigError(
                    f"{name} and {other} of the model share memory, as a view, .data or .t() of one another does. On "
                    "an XLA device each would have its own, and they would no longer be tied. Tie them by one "
                    "Parameter (self.b.weight = self.a.weight), or keep one and compute the other from it in forward "
                    "(F.linear(x, self.a.weight.t())); a buffer of its own is made by .clone().")


_Named = tuple[str, torch.Tensor]


def _meeting(group: list[_Named]) -> Iterator[tuple[_Named, _Named]]:
    """Yields the pairs of tensors of one storage whose ranges of memory meet."""
    ordered = sorted(group, key=lambda item: item[1].storage_offset())
    for place, item in enumerate(ordered):
        tensor = item[1]
        end = tensor.storage_offset() + sum((size - 1) * step for size, step in zip(
            tensor.shape, tensor.stride(), strict=True)) + 1
        for other in ordered[place + 1:]:
            if other[1].storage_offset() >= end:
                break
            yield item, other


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one storage have an element in common."""
    size = one.untyped_storage().nbytes()
    touched = torch.zeros(size, dtype=torch.bool)

    def part(tensor: torch.Tensor) -> torch.Tensor:
        width = tensor.element_size()
        return touched.as_strided((*tensor.shape, width), (*(stride * width for stride in tensor.stride()), 1),
                                  tensor.storage_offset() * width)

    part(one).fill_(True)
    return bool(part(other).any())
