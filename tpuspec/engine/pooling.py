"""Max pooling over windows that do not overlap, in the form that XLA:CPU is fast with.

XLA:CPU finds the places of the largest numbers by four arrays of indices, as large as the input, and scatters the
gradient to them on one thread. Where each number is in one window, plain loops do the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

_MOST_IN_WINDOW = 16
"""Each number of a window is a slice of the input; larger windows are left to XLA."""


def plain_pooling(artifact: bytes) -> bytes:
    """Returns a program whose max pooling and the gradient of it are plain loops, of the same values."""
    with mlir.make_ir_context() as context, ir.Location.unknown(context):
        module = stablehlo.deserialize_portable_artifact(context, artifact)
        found = [operation.operation for function in module.body.operations
                 for block in function.regions[0].blocks for operation in block.operations
                 if operation.operation.name in _FORMS]
        found = [operation for operation in found if _is_plain(operation)]
        if not found:
            return artifact
        for operation in found:
            with ir.InsertionPoint(operation):
                operation.results[0].replace_all_uses_with(_FORMS[operation.name](operation))
            operation.erase()
        return stablehlo.serialize_portable_artifact(
            module, stablehlo.get_current_version(), allow_other_dialects=True)


def _is_plain(operation: Any) -> bool:
    """Whether an operation takes the largest of windows side by side, without padding."""
    window = _numbers(operation, "window_dimensions")
    if len(operation.results) != 1 or not 1 < math.prod(window) <= _MOST_IN_WINDOW:
        return False
    if _numbers(operation, "window_strides") != window or any(
            number != 1 for name in ("base_dilations", "window_dilations") for number in _numbers(operation, name)):
        return False
    if "padding" in operation.attributes:
        padding = ir.DenseIntElementsAttr(operation.attributes["padding"])
        if any(padding[i] for i in range(len(padding))):
            return False
    if operation.name == "stablehlo.reduce_window":
        return _is_of_both(operation.regions[0], "stablehlo.maximum")
    chosen, added = operation.regions
    return _is_of_both(chosen, "stablehlo.compare") and _is_of_both(added, "stablehlo.add") and (
        _is_zero(operation.operands[2]))


def _is_of_both(region: Any, kind: str) -> bool:
    """Whether a region returns one operation of its two arguments, in their order; a comparison is 'not less'."""
    first, last = [*(each.operation for each in region.blocks[0].operations), None][:2]
    return (len(list(region.blocks[0].operations)) == 2 and first.name == kind
            and list(first.operands) == list(region.blocks[0].arguments) and list(last.operands) == [first.result]
            and (kind != "stablehlo.compare" or "GE" in str(first.attributes["comparison_direction"])))


def _is_zero(value: Any) -> bool:
    maker = value.owner
    if not isinstance(maker, ir.Operation) and not hasattr(maker, "operation"):
        return False  # an argument
    if maker.name != "stablehlo.constant":
        return False
    numbers = ir.DenseElementsAttr(maker.attributes["value"])
    return numbers.is_splat and float(ir.FloatAttr(numbers.get_splat_value()).value) == 0.0


def _pool(operation: Any) -> Any:
    x, initial = operation.operands
    made = operation.results[0].type
    largest = _broadcast(made, initial, [])
    for part in _parts(x, _numbers(operation, "window_dimensions"), _shape(made)):
        largest = stablehlo.maximum(largest, part)
    return largest


def _gradient(operation: Any) -> Any:
    """Gives each window's gradient to the first of its largest numbers."""
    x, gradient, zero = operation.operands
    window, num_windows = _numbers(operation, "window_dimensions"), _shape(gradient.type)
    whole, element = _shape(x.type), ir.RankedTensorType(x.type).element_type
    index = ir.IntegerType.get_signless(32)
    largest, *others = _parts(x, window, num_windows)
    place = _splat(num_windows, index, 0)
    for number, other in enumerate(others, start=1):
        stays = _compared(largest, other, "GE")
        largest = stablehlo.select(stays, largest, other)
        place = stablehlo.select(stays, place, _splat(num_windows, index, number))
    # [windows of dim 0, numbers of dim 0, windows of dim 1, ...]
    both = [size for pair in zip(num_windows, window, strict=True) for size in pair]
    dims = list(range(0, len(both), 2))
    each = ir.RankedTensorType.get(both, index)
    here = _splat(both, index, 0)
    for dim, size in enumerate(window):
        numbers = stablehlo.iota(each, 2 * dim + 1)
        here = stablehlo.add(stablehlo.multiply(here, _splat(both, index, size)), numbers)
    of_window = ir.RankedTensorType.get(both, element)
    given = stablehlo.select(_compared(_broadcast(each, place, dims), here, "EQ"),
                             _broadcast(of_window, gradient, dims), _broadcast(of_window, zero, []))
    covered = [one * other for one, other in zip(num_windows, window, strict=True)]
    made = stablehlo.reshape(ir.RankedTensorType.get(covered, element), given)
    rest = [size - used for size, used in zip(whole, covered, strict=True)]
    if not any(rest):
        return made
    none = [0] * len(rest)
    return stablehlo.pad(made, zero, edge_padding_low=none, edge_padding_high=rest, interior_padding=none)


_FORMS = {"stablehlo.reduce_window": _pool, "stablehlo.select_and_scatter": _gradient}


def _parts(x: Any, window: Sequence[int], num_windows: Sequence[int]) -> list[Any]:
    """Returns the first numbers of all windows, the second ones, and so on."""
    return [stablehlo.slice(x, start_indices=list(place), strides=list(window), limit_indices=[
        start + (num - 1) * size + 1 for start, num, size in zip(place, num_windows, window, strict=True)])
        for place in itertools.product(*map(range, window))]


def _compared(one: Any, other: Any, how: str) -> Any:
    return stablehlo.compare(one, other, stablehlo.ComparisonDirectionAttr.get(how))


def _numbers(operation: Any, name: str) -> list[int]:
    return list(ir.DenseI64ArrayAttr(operation.attributes[name])) if name in operation.attributes else []


def _shape(tensor: Any) -> list[int]:
    return list(ir.RankedTensorType(tensor).shape)


def _broadcast(made: Any, value: Any, dims: Sequence[int]) -> Any:
    return stablehlo.broadcast_in_dim(made, value, list(dims))


def _splat(shape: Sequence[int], element: Any, number: int) -> Any:
    tensor = ir.RankedTensorType.get(list(shape), element)
    return stablehlo.constant(ir.DenseElementsAttr.get_splat(tensor, ir.IntegerAttr.get(element, number)))
