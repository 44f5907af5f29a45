"""Where optimizers keep numbers: in groups, in the state of parameters, in attributes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpuspec.spec.backend import Replica
from tpuspec.tracer.traced_numbers import Leaf, TracedFloat, TracedInt

Place = tuple[str, str, Any, str, int]
"""'group', 'state' (of a parameter), 'attribute' or 'own' (in the state, under a key of its own); name of the
optimizer; number of the group or parameter; key; place in a tuple."""


@dataclass(frozen=True, slots=True)
class Held:
    """A number where an optimizer keeps it.

    Attributes:
      place: its name.
      holder: the dict, or the optimizer's vars.
      value: a number, or a tensor of the host that holds one.
    """

    place: Place
    holder: dict[str, Any]
    value: Any

    @property
    def number(self) -> Any:
        return self.value.item() if isinstance(self.value, Tensor) else self.value

    def put(self, value: Any) -> None:
        """Puts a number there, into the tensor where one holds it."""
        _, _, _, key, index = self.place
        there = self.holder[key]
        if index >= 0:
            self.holder[key] = type(there)([*there[:index], value, *there[index + 1:]])
        elif isinstance(there, Tensor):
            with torch.no_grad():
                there.fill_(value)
        else:
            self.holder[key] = value


def _is_held(value: Any) -> bool:
    if type(value) in (float, int, TracedFloat, TracedInt):
        return True
    return isinstance(value, Tensor) and value.device.type == "cpu" and value.numel() == 1


def held_by(name: str, optimizer: torch.optim.Optimizer) -> Iterator[Held]:
    """Yields the numbers of an optimizer."""
    index = 0
    for number, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key == "params":
                continue
            if type(value) in (tuple, list):
                if all(map(_is_held, value)):
                    for i, item in enumerate(value):
                        yield Held(("group", name, number, key, i), group, item)
            elif _is_held(value):
                yield Held(("group", name, number, key, -1), group, value)
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if state:
                for key, value in state.items():
                    if _is_held(value):
                        yield Held(("state", name, index, key, -1), state, value)
            index += 1
    for key, value in optimizer.state.items():
        if isinstance(key, str) and _is_held(value):
            yield Held(("own", name, 0, key, -1), optimizer.state, value)  # type: ignore[arg-type]  # a defaultdict
    for key, value in vars(optimizer).items():
        if type(value) in (float, int, TracedFloat, TracedInt):
            yield Held(("attribute", name, 0, key, -1), vars(optimizer), value)


def is_number(value: Any) -> bool:
    """Whether a hyper-parameter is a number, or several of them, that a step's plan follows."""
    return _is_held(value) or (type(value) in (tuple, list) and all(map(_is_held, value)))


def read_numbers(replica: Replica) -> list[tuple[Held, Any]]:
    """Returns all numbers of a replica's optimizers, to put them back."""
    return [(held, held.number) for name, optimizer in replica.optimizers.items() for held in held_by(name, optimizer)]


class Leaves:
    """Names the numbers that a step starts from: counters of equal value have one name, however many there are."""

    def __init__(self) -> None:
        self._classes: dict[tuple[str, str], dict[tuple[Any, Any], Leaf]] = {}

    def name(self, held: Held, number: Any) -> Leaf:
        """Returns the name of a number."""
        kind, name, _, key, _ = held.place
        if kind != "state":
            return held.place
        dtype = held.value.dtype if isinstance(held.value, Tensor) else type(number)
        # Numbered within the optimizer: a step may step them in another order than they were made in.
        of_kind = self._classes.setdefault((name, key), {})
        return of_kind.setdefault((dtype, number), ("state", name, key, len(of_kind)))


def is_same(one: Any, other: Any) -> bool:
    """Whether two numbers are one, of one type."""
    return type(one) is type(other) and (one == other or one != one)


def told(place: Place) -> str:
    """Names a place for people."""
    kind, name, index, key, _ = place
    whose = f"optimizer {name!r}" if name else "optimizer"
    return {"group": f"{whose} {key} of group {index}", "state": f"{whose} state {index} {key}",
            "attribute": f"{whose} attribute {key}", "own": f"{whose} state {key}"}[kind]
