"""What a step computed with numbers, to be done again for other ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tpuspec.tracer.traced_numbers import BINARY, COMPARED, DTYPES, ROUNDED, UNARY, Leaf, Node, NumberTrace, rounded


@dataclass(frozen=True, kw_only=True)
class NumberPlan:
    """What a step computes with numbers, to be done again for other ones.

    Attributes:
      nodes, guards: of the trace.
      inputs: (node, dtype) of each number that is an input of the graph.
      moves: (leaf, node) of what leaves are after the step.
    """

    nodes: tuple[Node, ...]
    guards: tuple[tuple[int, Any], ...]
    inputs: tuple[tuple[int, str], ...]
    moves: tuple[tuple[Leaf, int], ...]
    @functools.cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """The leaves that the step had."""
        return tuple(node[1] for node in self.nodes if node[0] == "leaf")

    @functools.cached_property
    def of_groups(self) -> tuple[Leaf, ...]:
        """Those of the leaves that stand in the optimizers' groups."""
        return tuple(leaf for leaf in self.leaves if leaf[0] == "group")

    @functools.cached_property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes of the inputs."""
        return tuple(DTYPES[dtype] for _, dtype in self.inputs)

    def run(self, values: Mapping[Leaf, Any]) -> tuple[list[Any], list[Any]] | None:
        """Computes the numbers of a step.

        Args:
          values: of the leaves.

        Returns:
          The inputs, and what the leaves of `moves` are afterwards; None where a guard does not hold.
        """
        try:
            return self._compiled(values)
        except (ArithmeticError, ValueError, TypeError, KeyError):
            return None

    def _used(self) -> list[int]:
        used = {place for place, _ in (*self.guards, *self.inputs)} | {place for _, place in self.moves}
        for place in range(len(self.nodes) - 1, -1, -1):
            node = self.nodes[place]
            if place in used and node[0] not in ("leaf", "const"):
                used.update(operand for operand in node[1:] if isinstance(operand, int))
        return sorted(used)

    @functools.cached_property
    def _compiled(self) -> Callable[[Mapping[Leaf, Any]], tuple[list[Any], list[Any]] | None]:
        guarded: dict[int, list[Any]] = {}
        for place, outcome in self.guards:
            guarded.setdefault(place, []).append(outcome)
        names: dict[str, Any] = {"math": math, "rounded": rounded, "f32": ROUNDED["torch.float32"]}
        lines = ["def run(values):"]
        for place in self._used():
            lines.append(f" n{place} = {self._term(place, names)}")
            for number, outcome in enumerate(guarded.get(place, ())):
                names[f"g{place}_{number}"] = outcome
                lines.append(f" if n{place} != g{place}_{number}: return None")
        inputs = ", ".join(f"n{place}" for place, _ in self.inputs)
        lines.append(f" return [{inputs}], [{', '.join(f'n{place}' for _, place in self.moves)}]")
        exec("\n".join(lines), names)  # of numbers and operators that stand above alone
        return names["run"]

    def _term(self, place: int, names: dict[str, Any]) -> str:
        operation, *operands = self.nodes[place]
        if operation == "leaf":
            names[f"l{place}"] = operands[0]
            return f"values[l{place}]"
        if operation == "const":
            return f"float({operands[1]!r})" if operands[0] == "float" else operands[1]
        if operation == "rounded":
            dtype = self.nodes[operands[1]][2]
            return f"f32(n{operands[0]})" if dtype == repr("torch.float32") else f"rounded(n{operands[0]}, {dtype})"
        if operation.startswith("math."):
            return f"{operation}({', '.join(f'n{operand}' for operand in operands)})"
        _, template = (BINARY.get(operation) or COMPARED.get(operation) or UNARY[operation])
        return template.format(*(f"n{operand}" for operand in operands))


def plan_of(trace: NumberTrace, inputs: Sequence[tuple[int, str]], moves: Sequence[tuple[Leaf, int]]) -> NumberPlan:
    """Returns the plan of a finished trace."""
    return NumberPlan(nodes=tuple(trace.nodes), guards=tuple(trace.guards), inputs=tuple(inputs), moves=tuple(moves))


def told_difference(old: NumberPlan, new: NumberPlan) -> str | None:
    """Says which number of two plans is another one; None where they compute something else."""
    if len(old.nodes) == len(new.nodes):
        for was, now in zip(old.nodes, new.nodes, strict=True):
            if was != now and was[0] == now[0] == "const":
                return f"a number that an optimizer computes with changes from step to step ({was[2]} -> {now[2]})"
    for was, now in zip(old.guards, new.guards, strict=False):
        if was != now and old.nodes[was[0]] == new.nodes[now[0]]:
            return ("a number of an optimizer decides on a branch, or goes into something that is not followed, and "
                    f"changes from step to step ({was[1]} -> {now[1]})")
    return None
