"""Numbers that remember how they were computed: what Python code makes of them is written down, to be done again.

An optimizer computes with Python numbers (a rate, a count of steps) that are others in each step. While its step is
traced they are `TracedFloat` and `TracedInt`: ordinary numbers for all code that reads them, which note every
operation in a `NumberTrace`. A number that an operation on tensors takes becomes an input of the graph. A branch, a
conversion or anything else that is not written down becomes a guard: the plan serves only where it comes out as it did.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Leaf = tuple[Any, ...]
"""Names a number that a plan starts from."""

Node = tuple[Any, ...]
"""('leaf', name), ('const', type, repr), or (operation, number of a node, ...)."""

BINARY: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "add": (operator.add, "({} + {})"), "sub": (operator.sub, "({} - {})"), "mul": (operator.mul, "({} * {})"),
    "truediv": (operator.truediv, "({} / {})"), "floordiv": (operator.floordiv, "({} // {})"),
    "mod": (operator.mod, "({} % {})"), "pow": (operator.pow, "({} ** {})"), "and": (operator.and_, "({} & {})"),
    "or": (operator.or_, "({} | {})"), "xor": (operator.xor, "({} ^ {})"), "lshift": (operator.lshift, "({} << {})"),
    "rshift": (operator.rshift, "({} >> {})"),
}
"""Name of an operation -> the function, and how it is written."""

COMPARED: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "lt": (operator.lt, "({} < {})"), "le": (operator.le, "({} <= {})"), "gt": (operator.gt, "({} > {})"),
    "ge": (operator.ge, "({} >= {})"), "eq": (operator.eq, "({} == {})"), "ne": (operator.ne, "({} != {})"),
}
UNARY: dict[str, tuple[Callable[[Any], Any], str]] = {
    "neg": (operator.neg, "(-{})"), "pos": (operator.pos, "(+{})"), "abs": (abs, "abs({})"), "bool": (bool, "bool({})"),
}
_OF_MATH = ("sqrt", "exp", "expm1", "log", "log1p", "log2", "log10", "pow", "sin", "cos", "tanh", "floor", "ceil",
            "isnan", "isinf", "isfinite", "fabs")

DTYPES: dict[str, torch.dtype] = {str(dtype): dtype for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool)}
ROUNDED: dict[str, Callable[[Any], Any]] = {
    "torch.float64": float, "torch.float32": lambda number: float(np.float32(number)), "torch.bool": bool}


def rounded(number: Any, dtype: str) -> Any:
    """Returns a number as a tensor of a dtype, by its name, would hold it."""
    simple = ROUNDED.get(dtype)
    return simple(number) if simple is not None else torch.tensor(number, dtype=DTYPES[dtype]).item()


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


class TracedInt(float):
    """An int that knows its trace; all arithmetic is plain Python's.

    It is a float to Python, which would else compute `1.0 / number` without asking it.
    """

    __slots__ = ("node", "trace", "value")

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
    for name, (operation, _) in BINARY.items():
        if cls is TracedInt or name not in ("and", "or", "xor", "lshift", "rshift"):
            method, reflected = _binary(name, operation)
            setattr(cls, f"__{name}__", method)
            setattr(cls, f"__r{name}__", reflected)
    for name, (operation, _) in COMPARED.items():
        setattr(cls, f"__{name}__", _compared(name, operation))
    for name, (operation, _) in UNARY.items():
        setattr(cls, f"__{name}__", _unary(name, operation))
    for name, convert in {"int": int, "float": float, "trunc": math.trunc, "floor": math.floor, "ceil": math.ceil,
                          "round": round, "divmod": divmod}.items():
        setattr(cls, f"__{name}__", _fixed(convert))
    if cls is TracedInt:
        setattr(cls, "__index__", _fixed(operator.index))  # noqa: B010 - as above
    cls.__hash__ = lambda self: hash(self.value)
    # What is only told or kept is no part of what the step computes.
    cls.__repr__ = cls.__str__ = lambda self: repr(self.value)
    cls.__format__ = lambda self, form: format(self.value, form)
    for name in ("__copy__", "__deepcopy__"):
        setattr(cls, name, lambda self, *_: self.value)
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
