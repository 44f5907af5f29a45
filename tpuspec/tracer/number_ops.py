"""Operations on tensors that take a traced number: on the device it becomes an input, on the host it is followed."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tpuspec.tracer import graph
from tpuspec.tracer.traced_numbers import MATH, NumberTrace, TracedFloat, TracedInt, plain

_TRACED = (TracedFloat, TracedInt)

_SAME_NAME = {
    "__add__": "add", "__radd__": "add", "__iadd__": "add_", "__sub__": "sub", "__rsub__": "rsub", "__isub__": "sub_",
    "__mul__": "mul", "__rmul__": "mul", "__imul__": "mul_", "__truediv__": "div", "__rtruediv__": "rdiv",
    "__rdiv__": "rdiv", "__div__": "div", "__itruediv__": "div_", "__idiv__": "div_", "__pow__": "pow",
    "__rpow__": "rpow", "__ipow__": "pow_", "__neg__": "neg", "negative": "neg", "negative_": "neg_",
    "subtract": "sub", "subtract_": "sub_", "multiply": "mul", "multiply_": "mul_", "divide": "div", "divide_": "div_",
    "true_divide": "div", "true_divide_": "div_", "clip": "clamp", "clip_": "clamp_", "absolute": "abs",
    "__abs__": "abs", "__gt__": "gt", "__lt__": "lt", "__ge__": "ge", "__le__": "le", "__eq__": "eq", "__ne__": "ne",
    "as_tensor": "tensor", "asarray": "tensor", "scalar_tensor": "tensor",
}
_TAKE_TENSORS = frozenset({
    "mul", "div", "add", "sub", "rsub", "rdiv", "pow", "rpow", "eq", "ne", "lt", "gt", "le", "ge", "where", "maximum",
    "minimum", "masked_fill", "fill", "copy", "__setitem__", "clamp", "clamp_min", "clamp_max"})
"""Operations that take a tensor wherever they take a number."""

_ON_NUMBERS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "pow": operator.pow,
    "rsub": lambda a, b: b - a, "rdiv": lambda a, b: b / a, "rpow": lambda a, b: b ** a, "neg": operator.neg,
    "abs": abs, "sqrt": MATH["sqrt"][1], "gt": operator.gt, "lt": operator.lt, "ge": operator.ge, "le": operator.le,
    "eq": operator.eq, "ne": operator.ne}
_SAME_VALUE = frozenset({"clone", "detach", "contiguous", "squeeze", "double", "float", "to", "tensor", "copy",
                         "fill"})
_OF_FORM = frozenset({"dim", "size", "numel", "is_floating_point", "is_complex", "__len__", "__hash__", "type",
                      "stride", "element_size", "is_contiguous", "__repr__", "__format__", "data_ptr",
                      "storage_offset", "nelement"})
_MAKE_NUMBERS = frozenset({"zeros", "ones", "tensor", "as_tensor"})
"""torch's optimizers make some of their numbers on the device; its plain form computes with them on the host."""

_MOST_DIFFERENCE = 1e-6
"""Of torch's own outcome on the host, whose powers may differ in a last bit. Farther away it is another operation."""


class NumberOps(TorchFunctionMode):
    """Follows traced numbers through the operations of an optimizer's step.

    Args:
      trace: where operations on numbers are noted.
      device: of the replica.
      keep_handles: whether the handles of inputs are wanted.

    Attributes:
      nodes: id -> (tensor, its node) of the host's own tensors of one number that are followed.
      inputs: (node, dtype) -> the input of the graph.
      handles: of the inputs.
      items_stay: whether item() of a device's tensor gives the tensor: the code around it can compute with either.
    """

    def __init__(self, trace: NumberTrace, device: torch.device, *, keep_handles: bool) -> None:
        super().__init__()
        self.nodes: dict[int, tuple[Tensor, int]] = {}
        self.inputs: dict[tuple[int, str], Tensor] = {}
        self.handles: list[int] = []
        self.items_stay = False
        self._trace, self._device, self._keep_handles = trace, device, keep_handles

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.items_stay and name == "item" and _is_on_device(args[0]) and _is_called_by_torch(sys._getframe(1)):
            return args[0].detach()
        if name in _MAKE_NUMBERS and _is_xla(kwargs.get("device")) and _is_called_by_torch(sys._getframe(1)) and (
                not args[0] if isinstance(args[0], tuple) else not isinstance(args[0], Tensor | torch.Size | list)):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if name == "__setitem__" and _is_mask(args[1]) and not isinstance(args[2], Tensor) and _is_on_device(args[0]):
            # As an assignment it makes a list of the places, whose length depends on values.
            func, name = Tensor.masked_fill_, "masked_fill_"
        values = list(_flat([*args, *kwargs.values()]))
        stays = self.items_stay and "alpha" in kwargs and _is_on_device(kwargs["alpha"])
        if not stays and not any(map(self._is_followed, values)):
            return func(*args, **kwargs)
        if name in _OF_FORM or (name == "__get__" and not isinstance(func(*args), Tensor)):
            return func(*args, **kwargs)
        if name.startswith("_foreach_") and hasattr(Tensor, name.removeprefix("_foreach_")):
            return self._each(name.removeprefix("_foreach_"), args, kwargs)
        name = _SAME_NAME.get(name, name)
        tensors = [value for value in values if _is_on_device(value)]
        if tensors:
            return self._on_device(name, func, list(args), kwargs, tensors)
        if any(map(_is_xla, values)):
            return self._onto_device(name, func, args, kwargs)
        return self._on_host(name, func, list(args), kwargs)

    def follow(self, tensor: Tensor, number: Any) -> None:
        """Follows a tensor of the host from here on, whose value is a traced number."""
        self.nodes[id(tensor)] = (tensor, self._trace.node_of(number))

    def number_of(self, value: Any) -> Any:
        """Returns the number that a number or a tensor of the host is, traced if it is followed."""
        if id(value) in self.nodes:
            return self._trace.number_at(self.nodes[id(value)][1])
        return value.item() if isinstance(value, Tensor) else value

    def send(self, value: Any, dtype: torch.dtype) -> Tensor:
        """Returns a traced number as an input of the graph."""
        number = self.number_of(value)
        key = (self._trace.node_of(number), str(dtype))
        if key not in self.inputs:
            (self.inputs[key],) = graph.send_apart([torch.tensor(plain(number), dtype=dtype)], str(self._device))
            if self._keep_handles:  # read now: once used it has no buffer of its own any more
                self.handles += graph.handles([self.inputs[key]])
        return self.inputs[key]

    def _is_followed(self, value: Any) -> bool:
        return type(value) in _TRACED or id(value) in self.nodes

    def _call_fixed(self, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Calls a function that numbers are not followed through: the plan serves only where they stay the same."""
        def fixed(value: Any) -> Any:
            if id(value) in self.nodes:
                self._trace.fix(self.number_of(value))
                return value
            return type(value)(map(fixed, value)) if type(value) in (list, tuple) else self._trace.fix(value)

        result = func(*map(fixed, args), **{key: fixed(value) for key, value in kwargs.items()})
        for value in _flat([*args, *kwargs.values(), result]):
            if id(value) in self.nodes and value.item() != plain(self.number_of(value)):  # it was written
                del self.nodes[id(value)]
        return result

    def _each(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Runs an operation on lists of tensors, one after the other."""
        def of(values: Any, i: int) -> Any:
            return values[i] if type(values) in (list, tuple) else values

        if name.startswith("addc") and len(args) == 4:
            args, kwargs = args[:3], {**kwargs, "value": args[3]}
        each = [self.__torch_function__(getattr(Tensor, name), (), [of(arg, i) for arg in args],
                                        {key: of(value, i) for key, value in kwargs.items()})
                for i in range(len(args[0]))]
        return each

    def _on_device(self, name: str, func: Callable[..., Any], args: list[Any], kwargs: dict[str, Any],
                   tensors: Sequence[Tensor]) -> Any:
        dtype = _dtype_beside(tensors)

        def sent(value: Any) -> Any:
            if not self._is_followed(value):
                return value
            is_whole = type(self.number_of(value)) is TracedInt
            return self.send(value, torch.int64 if is_whole and not dtype.is_floating_point else dtype)

        base = name if name.endswith("__") else name.rstrip("_")
        operands = [*args, *(kwargs[key] for key in ("other", "tensor1", "tensor2", "end") if key in kwargs)]
        factor = kwargs.get("alpha", kwargs.get("value"))
        if base in ("add", "sub", "addcmul", "addcdiv") and len(operands) == (3 if base in ("add", "sub") else 4):
            factor = operands.pop(1)  # add_(alpha, other), torch's old order
        if "out" in kwargs or not isinstance(operands[0], Tensor):
            return self._call_fixed(func, args, kwargs)
        if base in ("add", "sub") and factor is not None:
            return getattr(operands[0], name)(sent(operands[1]) * sent(factor))
        if base in ("addcmul", "addcdiv") and factor is not None:
            one, other = map(sent, operands[1:])
            term = one * other if base == "addcmul" else one / other
            return getattr(operands[0], name.replace(base, "add"))(term * sent(factor))
        if base == "lerp":
            weight = kwargs["weight"] if "weight" in kwargs else operands.pop()
            return self._lerp(operands[0], sent(operands[1]), weight, put=name.endswith("_"))
        if base == "full_like":
            made = torch.empty_like(args[0], **{key: value for key, value in kwargs.items() if key != "fill_value"})
            return made.fill_(self.send(kwargs.get("fill_value", args[-1]), made.dtype))
        if base == "addmm":
            factors = [sent(kwargs.get(key, 1)) for key in ("beta", "alpha")]
            return args[0] * factors[0] + (args[1] @ args[2]) * factors[1]
        if base not in _TAKE_TENSORS or set(kwargs) - {"other", "min", "max", "value", "exponent"}:
            return self._call_fixed(func, args, kwargs)
        if base.startswith("clamp"):  # takes numbers or tensors, no mixture
            def sent(value: Any) -> Any:
                return value if value is None or _is_on_device(value) else self.send(value, args[0].dtype)
        if base == "rdiv":
            return sent(args[1]) / args[0]
        if base == "rpow":
            return torch.pow(sent(args[1]), args[0])
        return func(*map(sent, args), **{key: sent(value) for key, value in kwargs.items()})

    def _lerp(self, start: Tensor, end: Any, weight: Any, *, put: bool) -> Tensor:
        """As torch on the host, whose formula depends on the weight: with weight 1 it is the end, to the bit."""
        if not self._is_followed(weight):
            return start.lerp_(end, weight) if put else start.lerp(end, weight)
        number, dtype = self.number_of(weight), _dtype_beside([start])
        if abs(number) < 0.5:
            return getattr(start, "add_" if put else "add")((end - start) * self.send(number, dtype))
        result = end - (end - start) * self.send(1 - number, dtype)
        return start.copy_(result) if put else result

    def _onto_device(self, name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        if name == "to":
            return self.send(args[0], args[0].dtype)
        if name == "tensor" and self._is_followed(args[0]):
            made = func(plain(self.number_of(args[0])), **kwargs)
            return made.fill_(self.send(args[0], made.dtype))
        if name == "full":
            number = kwargs.pop("fill_value", args[-1])
            made = torch.full(args[0], plain(number), **kwargs)
            return made.fill_(self.send(number, made.dtype))
        return self._call_fixed(func, args, kwargs)

    def _on_host(self, name: str, func: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
        if name in ("item", "__bool__"):
            number = self.number_of(args[0])
            return bool(number) if name == "__bool__" else number
        base = name if name.endswith("__") else name.rstrip("_")
        values = [*args, *(kwargs[key] for key in ("other", "exponent") if key in kwargs)]
        if base in _SAME_VALUE and not set(kwargs) - {"dtype", "device"}:
            source = args[1] if base in ("copy", "fill") else args[0]
            result = func(*map(plain, args), **kwargs)
            return self._followed(result, self._trace.rounded(self.number_of(source), result.dtype))
        if (base not in _ON_NUMBERS or set(kwargs) - {"other", "exponent"} or len(values) > 2
                or not all(isinstance(value, int | float | Tensor) and getattr(value, "ndim", 0) == 0
                           for value in values)):
            return self._call_fixed(func, args, kwargs)
        # Of the values before: one of the operands may be written.
        operands = [self.number_of(value) for value in values]
        result = func(*map(plain, args), **{key: plain(value) for key, value in kwargs.items()})
        if result.dtype is not torch.bool:
            operands = [self._trace.rounded(number, result.dtype) for number in operands]
        number = _ON_NUMBERS[base](*operands)
        if type(number) is bool:  # which is a guard now
            return result
        number = self._trace.rounded(number, result.dtype)
        if not abs(plain(number) - result.item()) <= _MOST_DIFFERENCE * abs(result.item()):
            for operand in operands:
                self._trace.fix(operand)
            number = result.item()
        return self._followed(result, number)

    def _followed(self, result: Tensor, number: Any) -> Tensor:
        """Follows a tensor, which gets the value that is computed again for each step."""
        if type(number) not in _TRACED:
            self.nodes.pop(id(result), None)
            return result
        if plain(number) != result.item():
            result.detach().fill_(plain(number))
        self.follow(result, number)
        return result


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if type(value) in (list, tuple):
            yield from _flat(value)
        else:
            yield value


def _is_on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "xla"


def _is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype is torch.bool


def _is_xla(value: Any) -> bool:
    return (isinstance(value, torch.device) and value.type == "xla") or (
        isinstance(value, str) and value.startswith("xla"))


def _is_called_by_torch(frame: FrameType) -> bool:
    """Whether it is code of torch's optimizers that calls, not that of a hook or a closure."""
    return frame.f_globals.get("__name__", "").startswith("torch.optim.")


def _dtype_beside(tensors: Sequence[Tensor]) -> torch.dtype:
    """Returns the dtype that torch gives a Python number beside some tensors."""
    for tensor in tensors:
        if tensor.dtype.is_complex:
            return tensor.dtype.to_real()
        if tensor.dtype.is_floating_point:
            return tensor.dtype
    return torch.get_default_dtype()
