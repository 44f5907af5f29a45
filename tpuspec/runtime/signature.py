"""What a captured program depends on besides its inputs, read at loop boundaries: another value is another program."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

from torch import Tensor

from tpuspec.runtime.optimizer_places import is_number
from tpuspec.runtime.python_state import HostCode, settings_of
from tpuspec.runtime.slots import GRADIENT, read_slots
from tpuspec.spec.backend import Replica, StepFunction

Settings = tuple[tuple[str, str], ...]

_TOLD = ("the state", "a module, or its train() or eval() mode,", "a hyper-parameter",
         "a Python value that the step reads")


class Signature(NamedTuple):
    """All that programs depend on.

    Attributes:
      state: name, shape, dtype and requires_grad of every tensor.
      modules: class and mode of every module.
      hyper_parameters: of the optimizers, but for numbers, which their plans follow.
      settings: plain values that the step's code and its modules read.
    """

    state: tuple[Hashable, ...]
    modules: tuple[Hashable, ...]
    hyper_parameters: tuple[Hashable, ...]
    settings: Settings


def read_signature(step: StepFunction, replica: Replica, counters: tuple[Hashable, ...], host_code: HostCode,
                   ) -> Signature:
    """Reads the signature of a step on a replica, whose state must be readable; counters: which of them are equal."""
    state = tuple((slot, tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
                  for slot, tensor in read_slots(replica).items() if slot.kind != GRADIENT)
    hyper_parameters = tuple(
        (name, number, key, repr(value)) for name, optimizer in replica.optimizers.items()
        for number, group in enumerate(optimizer.param_groups) for key, value in group.items()
        if key != "params" and not isinstance(value, Tensor) and not is_number(value))
    modules = () if replica.model is None else tuple(
        (type(module), module.training) for module in replica.model.modules())
    return Signature(state + counters, modules, hyper_parameters, read_settings(step, replica, host_code))


def read_settings(step: StepFunction, replica: Replica, host_code: HostCode) -> Settings:
    """Reads the part of a signature that nothing may change between two steps of a loop."""
    settings = settings_of(step, replica.model, host_code)
    return tuple(sorted((path, repr(value)) for path, value in settings.items()))


def told_change(old: Signature, new: Signature) -> str | None:
    """Says what changed between two signatures; None where nothing did."""
    was: Any
    now: Any
    for name, was, now in zip(_TOLD, old, new, strict=True):
        if was != now:
            gone, come = [item for item in was if item not in now], [item for item in now if item not in was]
            return f"{name} changed, {gone[:2]} -> {come[:2]}"
    return None
