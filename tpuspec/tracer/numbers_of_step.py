"""The numbers of one replica's optimizers while a step is traced: what its plan is made of."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from tpuspec.spec.backend import Replica
from tpuspec.tracer.number_ops import NumberOps
from tpuspec.tracer.number_plan import NumberPlan, plan_of
from tpuspec.tracer.optimizer_places import Leaves, Place, held_by, is_same, read_numbers, told
from tpuspec.tracer.torch_optimizers import as_single_tensors
from tpuspec.tracer.traced_numbers import Leaf, NumberTrace, TracedFloat, TracedInt, plain


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
        self._replica = replica
        self._leaves, self._leaf_of = Leaves(), dict[Place, Leaf]()
        self._now: dict[Place, Any] = {}
        self._before = {held.place: number for held, number in read_numbers(replica)} if watch else {}
        self._inside: list[tuple[torch.optim.Optimizer, contextlib.ExitStack]] = []
        self._lent: list[tuple[dict[str, Any], Tensor, float]] = []

    def lend_rates(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        """Lets scheduled learning rates be inputs of the graph for the code around the optimizer's step.

        A model_fn that returns the rate for a summary is replayed so.
        """
        for held in list(held_by(name, optimizer)):
            if held.place[0] == "group" and held.place[3] == "lr" and type(held.value) is float:
                if held.place not in self._leaf_of and held.place not in self._now:
                    leaf = self._leaf_of[held.place] = self._leaves.name(held, held.value)
                    self.values.setdefault(leaf, held.value)
                    self._now[held.place] = self.trace.leaf(leaf, held.value)
                now = self._now.get(held.place)
                if type(now) is TracedFloat and is_same(plain(now), held.value):
                    tensor = held.holder["lr"] = self.ops.send(now, torch.float32)
                    self._lent.append((held.holder, tensor, held.value))

    def take_rates_back(self) -> None:
        """Puts the numbers of `lend_rates` back, but where user code has set others."""
        for group, tensor, number in self._lent:
            if group["lr"] is tensor:
                group["lr"] = number
        self._lent.clear()

    def enter(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        """Puts traced numbers into an optimizer whose step begins.

        Steps may be nested: one optimizer wraps another, or calls the step of its base class, which runs the hooks too.
        """
        stack = contextlib.ExitStack()
        is_outermost = not self._inside
        is_inside = any(other is optimizer for other, _ in self._inside)
        self._inside.append((optimizer, stack))
        if is_inside:
            return
        stack.callback(self._leave, name, optimizer)
        stack.enter_context(as_single_tensors(optimizer, self.ops))
        for held in list(held_by(name, optimizer)):
            number = held.number
            if held.place not in self._leaf_of and held.place not in self._now:
                if type(number) is bool:
                    continue
                leaf = self._leaf_of[held.place] = self._leaves.name(held, number)
                self.values.setdefault(leaf, number)
                self._now[held.place] = self.trace.leaf(leaf, number)
            now = self._now.get(held.place)
            if type(now) not in (TracedFloat, TracedInt) or not is_same(plain(now), number):
                self._now.pop(held.place, None)  # set since then, by code that is not followed
            elif isinstance(held.value, Tensor):
                self.ops.follow(held.value, now)
            else:
                held.put(now)
        if is_outermost:
            stack.enter_context(self.ops)

    def leave(self) -> bool:
        """Puts numbers back into the optimizer whose step ends; returns whether no step is under way any more."""
        if self._inside:
            self._inside.pop()[1].close()
        return not self._inside

    def leave_all(self) -> None:
        """Puts numbers back into all optimizers: a step that raised has not ended."""
        while not self.leave():
            pass

    def _leave(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        for held in list(held_by(name, optimizer)):
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
                started = is_same(self.values[self._leaf_of[place]], self._before[place])
                stayed = self.trace.nodes[node][0] == "leaf" and is_same(self._before[place], number)
                if not apart and started and (stayed or is_same(plain(self._now[place]), number)):
                    continue
            elif is_same(number, self._before[place]):
                continue
            found.append(f"{told(place)} ({self._before[place]} -> {number})")
        return found
