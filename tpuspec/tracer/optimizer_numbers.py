"""The numbers of optimizers, which are others in each step: hyper-parameters, counts of steps, attributes.

Within an optimizer's step they are traced numbers, and become inputs of the graph; outside they are what torch and
users know. A replay computes them as the traced step did, on the host, as plain PyTorch computes them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tpuspec.spec.backend import Replica
from tpuspec.tracer.averaged_model import averages_on_device
from tpuspec.tracer.number_plan import NumberPlan
from tpuspec.tracer.numbers_of_step import NumbersOfStep
from tpuspec.tracer.optimizer_places import Held, Leaves, Place, held_by, is_number, is_same
from tpuspec.tracer.torch_optimizers import bring_home
from tpuspec.tracer.traced_numbers import Leaf


def is_scheduled(optimizer: torch.optim.Optimizer) -> bool:
    """Tells whether a torch learning rate schedule was made for an optimizer."""
    return getattr(optimizer.step, "_wrapped_by_lr_sched", False)


class OptimizerNumbers:
    """The numbers of a replica's optimizers over many steps.

    Args:
      replica: has the optimizers.
    """

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._values: dict[Leaf, Any] = {}
        self._members: dict[Leaf, list[Place]] = {}
        self._moved: set[Leaf] = set()
        self._next: tuple[NumberPlan, list[Any], list[Any]] | None = None
        self._sent: dict[int, tuple[NumberPlan, list[Any], list[Any]]] = {}
        self._tracing: NumbersOfStep | None = None

    def settle(self) -> None:
        """Puts the optimizers' numbers where a step looks for them: torch keeps some on the device, as on a GPU."""
        for optimizer in self._replica.optimizers.values():
            bring_home(optimizer)

    def others(self) -> list[Any]:
        """Returns what else a schedule may move: hyper-parameters that are no numbers."""
        return [value for optimizer in self._replica.optimizers.values() if is_scheduled(optimizer)
                for group in optimizer.param_groups for key, value in group.items()
                if key != "params" and not is_number(value) and not isinstance(value, Tensor)]

    @contextlib.contextmanager
    def in_place(self, *, watch: bool = False) -> Iterator[NumbersOfStep]:
        """Makes the numbers of the optimizers traced ones in their steps, within the block."""
        numbers = self._tracing = NumbersOfStep(self._replica, watch=watch)
        handles = []
        for name, optimizer in self._replica.optimizers.items():
            def begin(optimizer: torch.optim.Optimizer, args: object, kwargs: object, name: str = name) -> None:
                numbers.take_rates_back()
                numbers.enter(name, optimizer)

            def end(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
                if numbers.leave():
                    self._lend()

            handles += [optimizer.register_step_pre_hook(begin), optimizer.register_step_post_hook(end)]
        self._lend()
        try:
            with averages_on_device():
                yield numbers
        finally:
            self._tracing = None
            numbers.leave_all()
            numbers.take_rates_back()
            for handle in handles:
                handle.remove()

    def _lend(self) -> None:
        assert self._tracing is not None
        for name, optimizer in self._replica.optimizers.items():
            if is_scheduled(optimizer):
                self._tracing.lend_rates(name, optimizer)

    def adopt(self) -> tuple[Any, ...]:
        """Reads the numbers; returns which of them have one name."""
        self._values, self._members, self._next, leaves = {}, {}, None, Leaves()
        self._moved.clear()
        for name, optimizer in self._replica.optimizers.items():
            for held in held_by(name, optimizer):
                if held.place[0] != "group":
                    number = held.number
                    leaf = leaves.name(held, number)
                    self._values[leaf] = number
                    self._members.setdefault(leaf, []).append(held.place)
        return tuple((leaf, tuple(members)) for leaf, members in self._members.items())

    def prepare(self, plan: NumberPlan) -> bool:
        """Computes the numbers of the next step, for `sent` and `advance`; returns whether the plan serves."""
        values = self._values
        is_moved = bool(plan.moves) or self._next is None or self._next[0] is not plan
        for leaf in plan.of_groups:
            value = self._read_group(leaf)
            if value is not values.get(leaf):
                values[leaf], is_moved = value, True
        if not is_moved:  # as in the step before
            return True
        self._next = None
        outcome = plan.run(values)
        if outcome is None:
            return False
        self._next = (plan, *outcome)
        return True

    def are(self, known: Mapping[Leaf, Any]) -> bool:
        """Whether some numbers are, in the prepared step, what they were."""
        for leaf, value in known.items():
            now = self._values.get(leaf)
            if now is not value and not is_same(now, value):
                return False
        return True

    def sent(self, send: Callable[[Sequence[Any], Sequence[torch.dtype]], list[Any]]) -> list[Any]:
        """Returns the inputs of the prepared step; sent anew, by `Engine.put_numbers`, where one changed."""
        assert self._next is not None
        plan, numbers, _ = self._next
        kept = self._sent.get(id(plan))
        if kept is None:
            kept = self._sent[id(plan)] = (plan, [None] * len(numbers), [None] * len(numbers))
        _, old, arrays = kept
        if changed := [i for i, number in enumerate(numbers) if number != old[i]]:
            fresh = send([numbers[i] for i in changed], [plan.dtypes[i] for i in changed])
            for i, array in zip(changed, fresh, strict=True):
                old[i], arrays[i] = numbers[i], array
        return arrays

    def prepared(self) -> tuple[NumberPlan, list[Any]]:
        """Returns the plan and the inputs of the prepared step, as numbers."""
        assert self._next is not None
        return self._next[:2]

    def mark(self) -> tuple[Any, ...]:
        """Returns where the numbers stand, for `go_back`."""
        return dict(self._values), set(self._moved)

    def go_back(self, mark: tuple[Any, ...]) -> None:
        """Makes the numbers what they were; steps since then that moved those of groups cannot be taken back."""
        self._values, self._moved = mark

    def advance(self) -> None:
        """Makes the numbers those after the prepared step."""
        assert self._next is not None
        plan, _, moved = self._next
        for (leaf, _), value in zip(plan.moves, moved, strict=True):
            self._values[leaf] = value
            self._moved.add(leaf)
            if leaf[0] == "group":  # schedules read it
                self._held_of(leaf).put(value)

    def publish(self) -> None:
        """Puts the numbers where torch and users read them."""
        parameters = {name: [parameter for group in optimizer.param_groups for parameter in group["params"]]
                      for name, optimizer in self._replica.optimizers.items()}
        for leaf in self._moved:
            for kind, name, index, key, _ in self._members.get(leaf, ()):
                optimizer = self._replica.optimizers[name]
                holder: Any = vars(optimizer) if kind == "attribute" else optimizer.state
                if kind == "state":
                    holder = optimizer.state[parameters[name][index]]
                Held((kind, name, index, key, -1), holder, None).put(self._values[leaf])
        self._moved.clear()

    def _read_group(self, leaf: Leaf) -> Any:
        _, name, number, key, index = leaf
        value = self._replica.optimizers[name].param_groups[number].get(key)
        if index < 0 and type(value) is float:
            return value
        if index >= 0:
            value = value[index] if type(value) in (tuple, list) and len(value) > index else None
        return value.item() if isinstance(value, Tensor) else value

    def _held_of(self, place: Any) -> Held:
        return Held(place, self._replica.optimizers[place[1]].param_groups[place[2]], None)
