"""What a program was captured with besides its inputs, to say what has changed when it is captured anew."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

from torch import Tensor

from tpuspec.spec.backend import Replica
from tpuspec.tracer.optimizer_places import is_number
from tpuspec.tracer.slots import GRADIENT, read_slots

_TOLD = ("the state", "a module, or its train() or eval() mode,", "a hyper-parameter")


class StateForm(NamedTuple):
    """What programs depend on, by its parts.

    Attributes:
      state: name, shape, dtype and requires_grad of every tensor.
      modules: class and mode of every module.
      hyper_parameters: of the optimizers, but for numbers, which their plans follow.
    """

    state: tuple[Hashable, ...]
    modules: tuple[Hashable, ...]
    hyper_parameters: tuple[Hashable, ...]


def read_signature(replica: Replica) -> StateForm:
    """Reads the signature of a replica, whose state must be readable."""
    state = tuple((slot, tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
                  for slot, tensor in read_slots(replica).items() if slot.kind != GRADIENT)
    hyper_parameters = tuple(
        (name, number, key, repr(value)) for name, optimizer in replica.optimizers.items()
        for number, group in enumerate(optimizer.param_groups) for key, value in group.items()
        if key != "params" and not isinstance(value, Tensor) and not is_number(value))
    modules = () if replica.model is None else tuple(
        (type(module), module.training) for module in replica.model.modules())
    return StateForm(state, modules, hyper_parameters)


def told_change(old: StateForm, new: StateForm) -> str | None:
    """Says what changed between two signatures; None where nothing did."""
    was: Any
    now: Any
    for name, was, now in zip(_TOLD, old, new, strict=True):
        if was != now:
            gone, come = [item for item in was if item not in now], [item for item in now if item not in was]
            return f"{name} changed, {gone[:2]} -> {come[:2]}"
    return None
