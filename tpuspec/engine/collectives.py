"""What devices compute together, in the form that jax's runtime takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import sdy, stablehlo

from tpuspec.spec.engine import CONSTRAINT, CONSTRAINT_AXES

_HALVES = ("f16", "bf16")


def over_replicas(artifact: bytes, num_replicas: int) -> bytes:
    """Returns a program whose collectives name all replicas, with one operand each.

    torch_xla names none, and gives an all-reduce several operands: the tensors and a token. jax refuses several under
    `shard_map`, and hundreds of small ones one after the other wait for threads. So the tensors of a dtype are summed
    as one, end to end. Halves are summed in float32, which XLA:CPU needs, and which keeps the bits that many replicas
    would lose.
    """
    with mlir.make_ir_context() as context, ir.Location.unknown(context):
        module = stablehlo.deserialize_portable_artifact(context, artifact)
        found = list(_operations(module.operation, _COLLECTIVES))
        if not found:
            return artifact
        for channel, operation in enumerate(found, start=1):
            with ir.InsertionPoint(operation):
                _replace(operation, _attributes(num_replicas, channel))
        return stablehlo.serialize_portable_artifact(module, stablehlo.get_current_version())


def over_mesh(artifact: bytes, spec_of: Callable[[Sequence[Sequence[str]]], Sequence[Sequence[str]]],
              sizes: Mapping[str, int]) -> bytes:
    """Returns a program whose constraints are those of the partitioner.

    Args:
      artifact: of one device.
      spec_of: from the axes of each dim, as the user named them, to those of the devices.
      sizes: of the axes of the devices.
    """
    with mlir.make_ir_context() as context, ir.Location.unknown(context):
        module = stablehlo.deserialize_portable_artifact(context, artifact)
        found = [operation for operation in _operations(module.operation, ("stablehlo.custom_call",))
                 if ir.StringAttr(operation.attributes["call_target_name"]).value == CONSTRAINT]
        if not found:
            return artifact
        mesh = sdy.MeshAttr.get([sdy.MeshAxisAttr.get(name, size) for name, size in sizes.items()])
        for operation in found:
            axes = json.loads(ir.StringAttr(ir.DictAttr(
                operation.attributes["mhlo.frontend_attributes"])[CONSTRAINT_AXES]).value)
            dims = [sdy.DimensionShardingAttr.get([sdy.AxisRefAttr.get(name) for name in names], is_closed=True)
                    for names in spec_of(axes)]
            with ir.InsertionPoint(operation):
                constrained = sdy.sharding_constraint(operation.operands[0], sdy.TensorShardingAttr.get(mesh, dims))
            operation.results[0].replace_all_uses_with(constrained)
            operation.erase()
        return stablehlo.serialize_portable_artifact(
            module, stablehlo.get_current_version(), allow_other_dialects=True)


_COLLECTIVES = ("stablehlo.all_reduce", "stablehlo.all_gather", "stablehlo.reduce_scatter", "stablehlo.all_to_all",
                "stablehlo.collective_permute")


def _operations(operation: Any, names: Sequence[str]) -> Iterator[Any]:
    if operation.name in names:
        yield operation
        return
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield from _operations(inner.operation, names)


def _attributes(num_replicas: int, channel: int) -> dict[str, Any]:
    groups = f"dense<[{list(range(num_replicas))}]> : tensor<1x{num_replicas}xi64>"
    return {"replica_groups": ir.Attribute.parse(groups),
            "channel_handle": ir.Attribute.parse(f"#stablehlo.channel_handle<handle = {channel}, type = 1>"),
            "use_global_device_ids": ir.UnitAttr.get()}


def _replace(old: Any, attributes: dict[str, Any]) -> None:
    if old.name == "stablehlo.all_reduce":
        for result, value in zip(old.results, _all_reduce(old, attributes), strict=True):
            result.replace_all_uses_with(value)
        old.erase()
        return
    if old.name == "stablehlo.collective_permute":  # it names pairs
        old.attributes["channel_handle"] = attributes["channel_handle"]
        return
    for name, value in attributes.items():
        if name != "use_global_device_ids" or old.name != "stablehlo.all_to_all":
            old.attributes[name] = value


def _all_reduce(old: Any, attributes: dict[str, Any]) -> list[Any]:
    """Reduces each operand of a dtype as a part of one flat tensor; returns the results."""
    (block,) = old.regions[0].blocks
    kind = block.operations[0].operation.name
    results: list[Any] = [None] * len(old.operands)
    kinds: dict[str, list[int]] = {}
    for number, operand in enumerate(old.operands):
        kinds.setdefault(str(ir.RankedTensorType(operand.type).element_type), []).append(number)
    for element, numbers in kinds.items():
        given = [old.operands[number] for number in numbers]
        flat = [_reshaped(value, [_size(value)]) for value in given]
        whole = stablehlo.concatenate(flat, dimension=0) if len(flat) > 1 else flat[0]
        is_half = element in _HALVES and kind == "stablehlo.add"
        wide = stablehlo.convert(_typed(whole, ir.F32Type.get()), whole) if is_half else whole
        reduced = _reduce_one(wide, kind, attributes)
        whole = stablehlo.convert(whole.type, reduced) if is_half else reduced
        begin = 0
        for number, value in zip(numbers, given, strict=True):
            size = _size(value)
            part = whole if len(flat) == 1 else stablehlo.slice(
                whole, start_indices=[begin], limit_indices=[begin + size], strides=[1])
            results[number] = _reshaped(part, list(ir.RankedTensorType(value.type).shape))
            begin += size
    return results


def _reduce_one(value: Any, kind: str, attributes: dict[str, Any]) -> Any:
    element = ir.RankedTensorType(value.type).element_type
    scalar = ir.RankedTensorType.get([], element)
    made = ir.Operation.create("stablehlo.all_reduce", results=[value.type], operands=[value], regions=1,
                               attributes=attributes)
    block = made.regions[0].blocks.append(scalar, scalar)
    with ir.InsertionPoint(block):
        reduced = ir.Operation.create(kind, results=[scalar], operands=list(block.arguments))
        stablehlo.return_([reduced.result])
    return made.result


def _size(value: Any) -> int:
    size = 1
    for dim in ir.RankedTensorType(value.type).shape:
        size *= dim
    return size


def _reshaped(value: Any, shape: Sequence[int]) -> Any:
    element = ir.RankedTensorType(value.type).element_type
    return stablehlo.reshape(ir.RankedTensorType.get(shape, element), value)


def _typed(value: Any, element: Any) -> Any:
    return ir.RankedTensorType.get(ir.RankedTensorType(value.type).shape, element)
