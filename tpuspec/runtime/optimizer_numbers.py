"""The numbers of optimizers, which are others in each step: hyper-parameters, counts of steps, an optimizer's own.

Within an optimizer's step they are traced numbers, and become inputs of the graph; outside they are what torch and users
know. A replay computes them as the traced step did, on the host, as plain PyTorch computes them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpuspec.runtime import graph
from tpuspec.runtime.number_ops import NumberOps
from tpuspec.runtime.torch_optimizers import as_single_tensors, bring_home
from tpuspec.runtime.traced_numbers import Leaf, NumberPlan, NumberTrace, TracedFloat, TracedInt, plain, plan_of
from tpuspec.spec.backend import Replica

Place = tuple[str, str, Any, str, int]
"""'group', 'state' or 'attribute'; name of the optimizer; number of the group or parameter; key; place in a tuple."""


@dataclass(frozen=True, slots=True)
class _Held:
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


def _held(name: str, optimizer: torch.optim.Optimizer) -> Iterator[_Held]:
    """Yields the numbers of an optimizer."""
    index = 0
    for number, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key == "params":
                continue
            if type(value) in (tuple, list):
                if all(map(_is_held, value)):
                    for i, item in enumerate(value):
                        yield _Held(("group", name, number, key, i), group, item)
            elif _is_held(value):
                yield _Held(("group", name, number, key, -1), group, value)
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if state:
                for key, value in state.items():
                    if _is_held(value):
                        yield _Held(("state", name, index, key, -1), state, value)
            index += 1
    for key, value in vars(optimizer).items():
        if type(value) in (float, int, TracedFloat, TracedInt):
            yield _Held(("attribute", name, 0, key, -1), vars(optimizer), value)


def is_number(value: Any) -> bool:
    """Whether a hyper-parameter is a number, or several of them, that a step's plan follows."""
    return _is_held(value) or (type(value) in (tuple, list) and all(map(_is_held, value)))


def read_numbers(replica: Replica) -> list[tuple[_Held, Any]]:
    """Returns all numbers of a replica's optimizers, to put them back."""
    return [(held, held.number) for name, optimizer in replica.optimizers.items() for held in _held(name, optimizer)]


def is_scheduled(optimizer: torch.optim.Optimizer) -> bool:
    """Tells whether a torch learning rate schedule was made for an optimizer."""
    return getattr(optimizer.step, "_wrapped_by_lr_sched", False)


class _Leaves:
    """Names the numbers that a step starts from: counters of equal value have one name, however many there are."""

    def __init__(self) -> None:
        self._classes: dict[tuple[str, str, type, Any], Leaf] = {}

    def name(self, held: _Held, number: Any, step: int) -> Leaf:
        kind, name, index, key, place = held.place
        if kind != "state":
            return (kind, name, index, key, place, step if kind == "group" else 0)
        dtype = held.value.dtype if isinstance(held.value, Tensor) else type(number)
        return self._classes.setdefault((name, key, dtype, number), ("state", name, key, len(self._classes)))


class NumbersOfStep:
    """The numbers of one replica's optimizers while one step is traced.

    Args:
      replica: the replica.
      watch: whether a plan is wanted.

    Attributes:
      values: of the leaves.
      ops: the inputs.
    """

    def __init__(self, replica: Replica, *, watch: bool) -> None:
        self.values: dict[Leaf, Any] = {}
        self.trace = NumberTrace()
        self.ops = NumberOps(self.trace, replica.device, keep_handles=watch)
        self._replica, self._step = replica, 0
        self._leaves, self._leaf_of = _Leaves(), dict[Place, Leaf]()
        self._now: dict[Place, Any] = {}
        self._before = {held.place: number for held, number in read_numbers(replica)} if watch else {}
        self._inside: contextlib.ExitStack | None = None

    def begin(self, step: int) -> None:
        """Goes on to another training step of a program; hyper-parameters of groups are its own."""
        self._step = step
        for place, leaf in list(self._leaf_of.items()):
            number = self._now.get(place)
            if place[0] == "group" and type(number) in (TracedFloat, TracedInt) and (
                    self.trace.nodes[number.node] == ("leaf", leaf)):
                del self._now[place], self._leaf_of[place]

    def enter(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        """Puts traced numbers into an optimizer whose step begins."""
        self._inside = stack = contextlib.ExitStack()
        stack.callback(self._leave, name, optimizer)
        stack.enter_context(as_single_tensors(optimizer, self.ops))
        for held in list(_held(name, optimizer)):
            number = held.number
            if held.place not in self._leaf_of and held.place not in self._now:
                if type(number) is bool:
                    continue
                leaf = self._leaf_of[held.place] = self._leaves.name(held, number, self._step)
                self.values.setdefault(leaf, number)
                self._now[held.place] = self.trace.leaf(leaf, number)
            now = self._now.get(held.place)
            if type(now) not in (TracedFloat, TracedInt) or not _same(plain(now), number):
                self._now.pop(held.place, None)  # set since then, by code that is not followed
            elif isinstance(held.value, Tensor):
                self.ops.follow(held.value, now)
            else:
                held.put(now)
        stack.enter_context(self.ops)

    def leave(self) -> None:
        """Puts numbers back into the optimizer whose step is under way."""
        if self._inside is not None:
            self._inside.close()

    def _leave(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        self._inside = None
        for held in list(_held(name, optimizer)):
            self._now[held.place] = self.ops.number_of(held.value)
            if type(held.value) in (TracedFloat, TracedInt):
                held.put(plain(held.value))

    def plan(self) -> NumberPlan:
        """Returns what the step computed with numbers."""
        moves: dict[Leaf, int] = {}
        for place, leaf in self._leaf_of.items():
            if place in self._now:
                moves.setdefault(leaf, self.trace.node_of(self._now[place]))
        own = {leaf: self.trace.node_of(self.trace.leaf(leaf, value)) for leaf, value in self.values.items()}
        return plan_of(self.trace, list(self.ops.inputs),
                       [(leaf, node) for leaf, node in moves.items() if node != own[leaf]])

    def notes(self) -> list[str]:
        """Says which numbers changed in a way that a plan does not tell."""
        found = []
        moved: dict[Leaf, int] = {}
        for held, number in read_numbers(self._replica):
            place = held.place
            if place not in self._before:
                continue
            if place in self._leaf_of and place in self._now:
                node = self.trace.node_of(self._now[place])
                apart = moved.setdefault(self._leaf_of[place], node) != node
                # In a program of several steps a group holds already what the schedule has made of it since.
                started = self._step > 0 or _same(self.values[self._leaf_of[place]], self._before[place])
                stayed = self.trace.nodes[node][0] == "leaf" and _same(self._before[place], number)
                if not apart and started and (stayed or _same(plain(self._now[place]), number)):
                    continue
            elif _same(number, self._before[place]):
                continue
            found.append(f"{_told(place)} ({self._before[place]} -> {number})")
        return found


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and (one == other or one != one)


def _told(place: Place) -> str:
    kind, name, index, key, _ = place
    whose = f"optimizer {name!r}" if name else "optimizer"
    return {"group": f"{whose} {key} of group {index}", "state": f"{whose} state {index} {key}",
            "attribute": f"{whose} attribute {key}"}[kind]


class OptimizerNumbers:
    """The numbers of all replicas' optimizers over many steps.

    The first replica's optimizers have the schedules; the others follow.

    Args:
      replicas: the local replicas, equal in state.
    """

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._replicas, self._first = replicas, replicas[0]
        self._values: dict[Leaf, Any] = {}
        self._members: dict[Leaf, list[Place]] = {}
        self._moved: set[Leaf] = set()
        self._next: tuple[NumberPlan, list[Any], list[Any]] | None = None
        self._sent: dict[tuple[int, int], tuple[NumberPlan, list[Any], list[Tensor]]] = {}
        self._tracing: NumbersOfStep | None = None

    def settle(self) -> None:
        """Puts the optimizers' numbers where a step looks for them: torch keeps some on the device, as on a GPU."""
        for replica in self._replicas:
            for optimizer in replica.optimizers.values():
                bring_home(optimizer)

    def others(self) -> list[Any]:
        """Returns what else a schedule may move: hyper-parameters that are no numbers."""
        return [value for optimizer in self._first.optimizers.values() if is_scheduled(optimizer)
                for group in optimizer.param_groups for key, value in group.items()
                if key != "params" and not is_number(value) and not isinstance(value, Tensor)]

    @contextlib.contextmanager
    def in_place(self, replica: Replica, *, watch: bool = False) -> Iterator[NumbersOfStep]:
        """Makes the numbers of a replica's optimizers traced ones in their steps, within the block."""
        numbers = self._tracing = NumbersOfStep(replica, watch=watch)
        handles = []
        for name, optimizer in replica.optimizers.items():
            def begin(optimizer: torch.optim.Optimizer, args: object, kwargs: object, name: str = name) -> None:
                numbers.enter(name, optimizer)

            def end(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
                numbers.leave()

            handles += [optimizer.register_step_pre_hook(begin), optimizer.register_step_post_hook(end)]
        try:
            yield numbers
        finally:
            self._tracing = None
            numbers.leave()
            for handle in handles:
                handle.remove()

    def adopt(self) -> tuple[Any, ...]:
        """Reads the numbers; returns which of them have one name."""
        self._values, self._members, leaves = {}, {}, _Leaves()
        self._moved.clear()
        for name, optimizer in self._first.optimizers.items():
            for held in _held(name, optimizer):
                if held.place[0] != "group":
                    number = held.number
                    leaf = leaves.name(held, number, 0)
                    self._values[leaf] = number
                    self._members.setdefault(leaf, []).append(held.place)
        return tuple((leaf, tuple(members)) for leaf, members in self._members.items())

    def prepare(self, plan: NumberPlan) -> bool:
        """Computes the numbers of the next step, for `sent` and `advance`; returns whether the plan serves."""
        values = self._values
        for leaf in plan.leaves:
            if leaf[0] == "group":  # type: ignore[index]
                values[leaf] = self._read_group(leaf)
        outcome = plan.run(values)
        if outcome is None:
            return False
        self._next = (plan, *outcome)
        return True

    def are(self, known: Mapping[Leaf, Any]) -> bool:
        """Whether some numbers are, in the prepared step, what they were."""
        return all(_same(self._values.get(leaf), value) for leaf, value in known.items())

    def sent(self, replica: Replica) -> list[Tensor]:
        """Returns the inputs of the prepared step on a replica's device; sent anew where one changed."""
        assert self._next is not None
        plan, numbers, _ = self._next
        key = (replica.ordinal, id(plan))
        kept = self._sent.get(key)
        if kept is None:
            kept = (plan, [None] * len(numbers), [None] * len(numbers))  # type: ignore[list-item]
            self._sent[key] = kept
        _, old, tensors = kept
        if changed := [i for i, number in enumerate(numbers) if number != old[i] or old[i] is None]:
            fresh = graph.send([torch.tensor(numbers[i], dtype=plan.dtypes[i]) for i in changed], str(replica.device))
            for i, tensor in zip(changed, fresh, strict=True):
                old[i], tensors[i] = numbers[i], tensor
        return tensors

    def advance(self) -> None:
        """Makes the numbers those after the prepared step."""
        assert self._next is not None
        plan, _, moved = self._next
        for (leaf, _), value in zip(plan.moves, moved, strict=True):
            self._values[leaf] = value
            self._moved.add(leaf)
            if leaf[0] == "group":  # type: ignore[index]  # schedules read it
                for replica in self._replicas:
                    self._held_of(replica, leaf[:5]).put(value)  # type: ignore[index]

    def publish(self) -> None:
        """Puts the numbers where torch and users read them."""
        for replica in self._replicas:
            parameters = {name: [parameter for group in optimizer.param_groups for parameter in group["params"]]
                          for name, optimizer in replica.optimizers.items()}
            for leaf in self._moved:
                for kind, name, index, key, _ in self._members.get(leaf, ()):
                    holder = (vars(replica.optimizers[name]) if kind == "attribute"
                              else replica.optimizers[name].state[parameters[name][index]])
                    _Held((kind, name, index, key, -1), holder, None).put(self._values[leaf])
        self._moved.clear()

    def _read_group(self, leaf: Leaf) -> Any:
        _, name, number, key, index, _ = leaf  # type: ignore[misc]
        group = self._first.optimizers[name].param_groups[number]
        value = group.get(key)
        if index >= 0:
            value = value[index] if type(value) in (tuple, list) and len(value) > index else None
        return value.item() if isinstance(value, Tensor) else value

    def _held_of(self, replica: Replica, place: Any) -> _Held:
        return _Held(place, replica.optimizers[place[1]].param_groups[place[2]], None)


class NumbersOfSteps(OptimizerNumbers):
    """The numbers of several steps in one program: hyper-parameters of groups as they were noted, step after step."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        super().__init__(replicas)
        self._noted: list[list[dict[str, Any]]] = []

    def note(self, num_steps: int, after_each: Callable[[], None]) -> bool:
        """Notes the hyper-parameters of the next steps; returns whether the schedules move nothing but numbers."""
        self._noted, others = [], [self.others()]
        for _ in range(num_steps):
            self._noted.append([
                {key: value.clone() if isinstance(value, Tensor) else value
                 for key, value in group.items() if key != "params"}
                for optimizer in self._first.optimizers.values() for group in optimizer.param_groups])
            after_each()
            others.append(self.others())
        return all(other == others[0] for other in others)

    @contextlib.contextmanager
    def of_step(self, number: int, replica: Replica) -> Iterator[None]:
        """Puts one step's hyper-parameters into the groups within a block."""
        assert self._tracing is not None
        self._tracing.begin(number)
        groups = [group for optimizer in replica.optimizers.values() for group in optimizer.param_groups]
        kept = []
        for group, noted in zip(groups, self._noted[number], strict=True):
            for key, value in noted.items():
                there = group.get(key)
                if isinstance(there, Tensor) and isinstance(value, Tensor):
                    if there.device.type == "cpu":
                        kept.append((there, there.clone(), value))
                        there.detach().copy_(value)
                elif there is not value:
                    kept.append((group, key, there, value))
                    group[key] = value
        try:
            yield
        finally:
            for item in kept:
                if len(item) == 3:
                    there, was, put = item
                    if torch.equal(there, put):
                        there.detach().copy_(was)
                else:
                    group, key, was, put = item
                    if group.get(key) is put or group.get(key) == put:
                        group[key] = was

    def _read_group(self, leaf: Leaf) -> Any:
        _, name, number, key, index, step = leaf  # type: ignore[misc]
        first = 0
        for other, optimizer in self._first.optimizers.items():
            if other == name:
                break
            first += len(optimizer.param_groups)
        value = self._noted[step][first + number].get(key)
        if index >= 0:
            value = value[index] if type(value) in (tuple, list) and len(value) > index else None
        return value.item() if isinstance(value, Tensor) else value
