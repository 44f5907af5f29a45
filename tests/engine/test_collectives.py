"""Collectives of a traced program, in the form that jax runs."""

from __future__ import annotations

import re

import pytest
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from tpuspec.engine.collectives import over_replicas

PROGRAM = """
func.func @main(%a: tensor<5x2xf32>, %b: tensor<3xbf16>, %token: tensor<f32>) -> (tensor<5x2xf32>, tensor<3xbf16>) {
  %0:2 = "stablehlo.all_reduce"(%a, %token) <{replica_groups = dense<> : tensor<0x0xi64>}> ({
    ^bb0(%x: tensor<f32>, %y: tensor<f32>):
      %s = stablehlo.add %x, %y : tensor<f32>
      stablehlo.return %s : tensor<f32>
  }) : (tensor<5x2xf32>, tensor<f32>) -> (tensor<5x2xf32>, tensor<f32>)
  %1 = "stablehlo.all_reduce"(%b) <{replica_groups = dense<> : tensor<0x0xi64>}> ({
    ^bb0(%x: tensor<bf16>, %y: tensor<bf16>):
      %s = stablehlo.KIND %x, %y : tensor<bf16>
      stablehlo.return %s : tensor<bf16>
  }) : (tensor<3xbf16>) -> tensor<3xbf16>
  return %0#0, %1 : tensor<5x2xf32>, tensor<3xbf16>
}
"""


def rewritten(text: str, num_replicas: int) -> str:
    with mlir.make_ir_context() as context, ir.Location.unknown(context):
        module = ir.Module.parse(text)
        artifact = stablehlo.serialize_portable_artifact(module, stablehlo.get_current_version())
    with mlir.make_ir_context() as context, ir.Location.unknown(context):
        return str(stablehlo.deserialize_portable_artifact(context, over_replicas(artifact, num_replicas)))


@pytest.mark.parametrize(("kind", "dtype"), [("add", "f32"), ("maximum", "bf16")])
def test_an_all_reduce_is_one_flat_tensor_of_all_replicas_and_sums_of_halves_are_of_floats(kind, dtype):
    text = rewritten(PROGRAM.replace("KIND", kind), 4)
    operands = re.findall(r"\}\) : \((tensor<[^>]*>)\) -> \1", text)
    assert operands == ["tensor<11xf32>", f"tensor<3x{dtype}>"]
    assert text.count("replica_groups = dense<[[0, 1, 2, 3]]>") == 2
    assert sorted(re.findall(r"handle = (\d)", text)) == ["1", "2"]
    assert text.count("use_global_device_ids") == 2


def test_a_program_without_collectives_stays_as_it_is():
    text = "func.func @main(%a: tensor<2xf32>) -> tensor<2xf32> { return %a : tensor<2xf32> }"
    with mlir.make_ir_context() as context, ir.Location.unknown(context):
        artifact = stablehlo.serialize_portable_artifact(ir.Module.parse(text), stablehlo.get_current_version())
    assert over_replicas(artifact, 4) is artifact
