"""Numbers that remember how they were computed: what Python code makes of them is written down, to be done again.

An optimizer computes with Python numbers (a rate, a count of steps) that are others in each step. While its step is
traced they are `TracedFloat` and `TracedInt`: ordinary numbers for all code that reads them, which note every operation in
a `NumberTrace`. A number that an operation on tensors takes becomes an input of the graph. A branch, a conversion or
anything else that is not written down becomes a guard: the plan serves only where it comes out as it did.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Leaf = Hashable
"""Names a number that a plan starts from."""

Node = tuple[Any, ...]
"""('leaf', name), ('const', type, repr), or (operation, number of a node, ...)."""

_BINARY: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "add": (operator.add, "({} + {})"), "sub": (operator.sub, "({} - {})"), "mul": (operator.mul, "({} * {})"),
    "truediv": (operator.truediv, "({} / {})"), "floordiv": (operator.floordiv, "({} // {})"),
    "mod": (operator.mod, "({} % {})"), "pow": (operator.pow, "({} ** {})"), "and": (operator.and_, "({} & {})"),
    "or": (operator.or_, "({} | {})"), "xor": (operator.xor, "({} ^ {})"), "lshift": (operator.lshift, "({} << {})"),
    "rshift": (operator.rshift, "({} >> {})"),
}
_COMPARED: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "lt": (operator.lt, "({} < {})"), "le": (operator.le, "({} <= {})"), "gt": (operator.gt, "({} > {})"),
    "ge": (operator.ge, "({} >= {})"), "eq": (operator.eq, "({} == {})"), "ne": (operator.ne, "({} != {})"),
}
_UNARY: dict[str, tuple[Callable[[Any], Any], str]] = {
    "neg": (operator.neg, "(-{})"), "pos": (operator.pos, "(+{})"), "abs": (abs, "abs({})"), "bool": (bool, "bool({})"),
}
_OF_MATH = ("sqrt", "exp", "expm1", "log", "log1p", "log2", "log10", "pow", "sin", "cos", "tanh", "floor", "ceil",
            "isnan", "isinf", "isfinite", "fabs")

_DTYPES: dict[str, torch.dtype] = {str(dtype): dtype for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool)}
_ROUNDED: dict[str, Callable[[Any], Any]] = {
    "torch.float64": float, "torch.float32": lambda number: float(np.float32(number)), "torch.bool": bool}


def rounded(number: Any, dtype: str) -> Any:
    """Returns a number as a tensor of a dtype, by its name, would hold it."""
    simple = _ROUNDED.get(dtype)
    return simple(number) if simple is not None else torch.tensor(number, dtype=_DTYPES[dtype]).item()


def plain(value: Any) -> Any:
    """Returns the number that a traced one stands for; anything else as it is."""
    return value.value if type(value) in (TracedFloat, TracedInt) else value


class NumberTrace:
    """What was computed with numbers in one step.

    Attributes:
      nodes: every number, after those that it is made of.
      guards: (node, outcome) of what must come out as it did.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.guards: dict[tuple[int, Any], None] = {}
        self._values: list[Any] = []
        self._known: dict[Node, int] = {}

    def leaf(self, name: Leaf, value: float) -> Any:
        """Returns a number that a plan starts from."""
        return self._number(("leaf", name), value)

    def made(self, operation: str, value: Any, *operands: Any) -> Any:
        """Returns the outcome of an operation on numbers, of which one may be traced."""
        return self._number((operation, *map(self.node_of, operands)), value)

    def node_of(self, number: Any) -> int:
        """Returns the node of a number; of one that is not traced, or in another trace, a constant."""
        if type(number) in (TracedFloat, TracedInt):
            if number.trace is self:
                return number.node
            number = number.value
        return self._place(("const", type(number).__name__, repr(number)), number)

    def number_at(self, node: int) -> Any:
        """Returns the number of a node."""
        return self._wrapped(self._values[node], node)

    def rounded(self, number: Any, dtype: torch.dtype) -> Any:
        """Returns a number as a tensor of that dtype would hold it."""
        held = rounded(plain(number), str(dtype))
        return self.made("rounded", held, number, str(dtype)) if type(number) in (TracedFloat, TracedInt) else held

    def guard(self, operation: str, outcome: Any, *operands: Any) -> None:
        """Notes that the step went on as an outcome told it."""
        self.guards.setdefault((self._place((operation, *map(self.node_of, operands)), outcome), outcome))

    def fix(self, number: Any) -> Any:
        """Notes that a traced number went where it is not followed; returns what it stands for."""
        if type(number) in (TracedFloat, TracedInt):
            self.guards.setdefault((number.node, number.value))
        return plain(number)

    def _number(self, node: Node, value: Any) -> Any:
        place = self._place(node, value)
        if type(value) not in (float, int):  # a bool, or complex, as a root of a negative number
            self.guards.setdefault((place, value))
        return self._wrapped(value, place)

    def _wrapped(self, value: Any, place: int) -> Any:
        if type(value) is float:
            return TracedFloat(value, self, place)
        return TracedInt(value, self, place) if type(value) is int else value

    def _place(self, node: Node, value: Any) -> int:
        place = self._known.get(node)
        if place is None:
            place = self._known[node] = len(self.nodes)
            self.nodes.append(node)
            self._values.append(value)
        return place


class TracedFloat(float):
    """A float that knows its trace; all arithmetic is plain Python's."""

    __slots__ = ("node", "trace", "value")

    def __new__(cls, value: float, trace: NumberTrace, node: int) -> TracedFloat:
        made = super().__new__(cls, value)
        made.value, made.trace, made.node = value, trace, node
        return made


class TracedInt(int):
    """An int that knows its trace; all arithmetic is plain Python's."""

    value: int
    trace: NumberTrace
    node: int

    def __new__(cls, value: int, trace: NumberTrace, node: int) -> TracedInt:
        made = super().__new__(cls, value)
        made.value, made.trace, made.node = value, trace, node
        return made


def _is_operand(value: Any) -> bool:
    return isinstance(value, int | float)


def _binary(name: str, operation: Callable[[Any, Any], Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def method(self: Any, other: Any) -> Any:
        if not _is_operand(other):
            return NotImplemented
        return self.trace.made(name, operation(self.value, plain(other)), self, other)

    def reflected(self: Any, other: Any) -> Any:
        if not _is_operand(other):
            return NotImplemented
        return self.trace.made(name, operation(plain(other), self.value), other, self)

    return method, reflected


def _compared(name: str, operation: Callable[[Any, Any], bool]) -> Callable[..., Any]:
    def method(self: Any, other: Any) -> Any:
        if not _is_operand(other):
            return NotImplemented
        outcome = operation(self.value, plain(other))
        self.trace.guard(name, outcome, self, other)
        return outcome

    return method


def _unary(name: str, operation: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda self: self.trace.made(name, operation(self.value), self)


def _fixed(convert: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args: convert(self.trace.fix(self), *args)


def _install(cls: Any) -> None:
    for name, (operation, _) in _BINARY.items():
        if cls is TracedInt or name not in ("and", "or", "xor", "lshift", "rshift"):
            method, reflected = _binary(name, operation)
            setattr(cls, f"__{name}__", method)
            setattr(cls, f"__r{name}__", reflected)
    for name, (operation, _) in _COMPARED.items():
        setattr(cls, f"__{name}__", _compared(name, operation))
    for name, (operation, _) in _UNARY.items():
        setattr(cls, f"__{name}__", _unary(name, operation))
    for name, convert in {"int": int, "float": float, "trunc": math.trunc, "floor": math.floor, "ceil": math.ceil,
                          "round": round, "divmod": divmod}.items():
        setattr(cls, f"__{name}__", _fixed(convert))
    if cls is TracedInt:
        cls.__index__ = _fixed(operator.index)
    cls.__hash__ = lambda self: hash(self.value)
    # What is only told or kept is no part of what the step computes.
    cls.__repr__ = cls.__str__ = lambda self: repr(self.value)
    cls.__format__ = lambda self, form: format(self.value, form)
    cls.__copy__ = cls.__deepcopy__ = lambda self, *_: self.value
    cls.__reduce_ex__ = lambda self, protocol: (type(self.value), (self.value,))


_install(TracedFloat)
_install(TracedInt)


def _of_math(name: str) -> Callable[..., Any]:
    function = getattr(math, name)

    def traced(*args: Any) -> Any:
        for arg in args:
            if type(arg) in (TracedFloat, TracedInt):
                return arg.trace.made(f"math.{name}", function(*map(plain, args)), *args)
        return function(*args)

    return traced


MATH = {name: (getattr(math, name), _of_math(name)) for name in _OF_MATH}
"""Functions of `math`, which would read a number without a word: as they are, and such that follow traced numbers."""


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
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes of the inputs."""
        return tuple(_DTYPES[dtype] for _, dtype in self.inputs)

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
        names: dict[str, Any] = {"math": math, "rounded": rounded, "f32": _ROUNDED["torch.float32"]}
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
        _, template = (_BINARY.get(operation) or _COMPARED.get(operation) or _UNARY[operation])
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
