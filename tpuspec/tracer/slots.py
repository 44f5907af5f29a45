"""The training state of a replica by name: every device tensor that a step may read and write back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from tpuspec.spec.backend import Replica


class Slot(NamedTuple):
    """A place of state.

    Attributes:
      kind: 'parameter', 'gradient', 'buffer', 'attribute', 'optimizer', 'hyper-parameter' or 'step'.
      name: of the parameter, buffer or module's attribute; of the optimizer ('' for a single one) for its state.
      place: number of the parameter in an optimizer, or of the group; 0 elsewhere.
      key: name of the optimizer's state or hyper-parameter.
    """

    kind: str
    name: str
    place: int = 0
    key: str = ""

    def __str__(self) -> str:
        parts = [self.kind, repr(self.name) if self.name else "", str(self.place) if self.key else "", self.key]
        return " ".join(part for part in parts if part)


GRADIENT = "gradient"
ATTRIBUTE = "attribute"
"""A tensor that a module keeps beside its buffers, as an auxiliary loss."""


_OWN = frozenset({GRADIENT, ATTRIBUTE, "buffer"})


def is_own(slot: Slot) -> bool:
    """Whether every replica has a place of state for itself: gradients before they are reduced, and statistics."""
    return slot.kind in _OWN


def module_tensors(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, Tensor]]:
    """Yields the tensors that modules keep as plain attributes: module, its path, name of the attribute, tensor."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield module, path, name, value


def read_slots(replica: Replica) -> dict[Slot, Tensor]:
    """Returns the state's tensors on the replica's device; a tensor that several names share stands under the first."""
    slots: dict[Slot, Tensor] = {}
    seen: set[int] = set()
    for slot, tensor in _named(replica):
        if id(tensor) not in seen and tensor.device.type == replica.device.type:
            seen.add(id(tensor))
            slots[slot] = tensor
    return slots


def _named(replica: Replica) -> Iterator[tuple[Slot, Tensor]]:
    if replica.model is not None:
        for name, parameter in replica.model.named_parameters():
            yield Slot("parameter", name), parameter
            if parameter.grad is not None:
                yield Slot(GRADIENT, name), parameter.grad
        for name, buffer in replica.model.named_buffers():
            yield Slot("buffer", name), buffer
        for _, path, name, value in module_tensors(replica.model):
            yield Slot(ATTRIBUTE, f"{path}.{name}" if path else name), value
    for name, optimizer in replica.optimizers.items():
        index = 0
        for number, group in enumerate(optimizer.param_groups):
            for key, value in group.items():
                if isinstance(value, Tensor):
                    yield Slot("hyper-parameter", name, number, key), value
            for parameter in group["params"]:
                yield Slot("parameter", name, index, "of the optimizer"), parameter
                if parameter.grad is not None:
                    yield Slot(GRADIENT, name, index, "of the optimizer"), parameter.grad
                for key, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        yield Slot("optimizer", name, index, key), value
                    elif isinstance(value, list | tuple):
                        for i, item in enumerate(value):
                            if isinstance(item, Tensor):
                                yield Slot("optimizer", name, index, f"{key}[{i}]"), item
                index += 1
    yield Slot("step", "global_step"), replica.global_step


def gradient_owners(replica: Replica) -> dict[Slot, Tensor]:
    """Returns the parameter whose `grad` each gradient slot is, also where there is no gradient now."""
    owners: dict[Slot, Tensor] = {}
    seen: set[int] = set()
    if replica.model is not None:
        for name, parameter in replica.model.named_parameters():
            seen.add(id(parameter))
            owners[Slot(GRADIENT, name)] = parameter
    for name, optimizer in replica.optimizers.items():
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, parameter in enumerate(parameters):
            if id(parameter) not in seen:
                owners[Slot(GRADIENT, name, index, "of the optimizer")] = parameter
    return owners


def told_slots(replica: Replica) -> dict[Slot, str]:
    """Names the places of an optimizer's state by their parameters, as "exp_avg of 'encoder.0.weight'"."""
    names = {} if replica.model is None else {id(each): name for name, each in replica.model.named_parameters()}
    told: dict[Slot, str] = {}
    for slot in read_slots(replica):
        if slot.kind == "optimizer":
            groups = replica.optimizers[slot.name].param_groups
            owner = [parameter for group in groups for parameter in group["params"]][slot.place]
            if (name := names.get(id(owner))) is not None:
                told[slot] = f"{slot.key} of {name!r}"
    return told
