"""Max pooling in the form that XLA:CPU is fast with, beside XLA's own and torch's."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from jax import export, lax
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo
from torch.nn import functional

from tpuspec.engine.executable import as_exported
from tpuspec.engine.pooling import plain_pooling


def pooled(window, strides=None, padding="VALID"):
    """Max pooling with its gradient, as a function of input and gradient."""
    sizes = (1, 1, *window), (1, 1, *(strides or window))

    def run(x, gradient):
        out, backward = jax.vjp(lambda x: lax.reduce_window(x, -np.inf, lax.max, *sizes, padding), x)
        return out, backward(gradient)[0]

    return run


def artifact_of(function, *given):
    return export.export(jax.jit(function), platforms=("cpu",))(*given).mlir_module_serialized


def left_to_xla(artifact):
    """Returns the names of the operations that XLA pools by."""
    with mlir.make_ir_context() as context, ir.Location.unknown(context):
        text = str(stablehlo.deserialize_portable_artifact(context, artifact))
    return [name for name in ("select_and_scatter", "reduce_window") if f"stablehlo.{name}" in text]


def results(artifact, *given):
    return [np.asarray(each) for each in jax.jit(as_exported(artifact, "cpu").call)(*given)]


@pytest.mark.parametrize(("size", "window"), [((4, 6), (2, 2)), ((5, 7), (2, 3)), ((4, 4), (4, 4))])
@pytest.mark.parametrize("values", ["ties", "floats", "halves"])
def test_values_and_gradients_are_torchs_and_xlas_own_also_where_numbers_are_equal(size, window, values):
    generator = torch.Generator().manual_seed(0)
    shape = (3, 2, *size)
    x = (torch.randint(0, 3, shape, generator=generator).float() if values == "ties" else
         torch.randn(shape, generator=generator)).to(torch.bfloat16 if values == "halves" else torch.float32)
    x = x.requires_grad_()
    expected = functional.max_pool2d(x, window)
    gradient = torch.randn(expected.shape, generator=generator).to(x.dtype)
    (of_x,) = torch.autograd.grad(expected, x, gradient)
    given = [jax.numpy.asarray(each.detach().float().numpy(), dtype=str(x.dtype).removeprefix("torch."))
             for each in (x, gradient)]
    artifact = artifact_of(pooled(window), *given)
    assert plain_pooling(artifact) != artifact
    assert not left_to_xla(plain_pooling(artifact))
    for found, wanted in zip(results(artifact, *given), (expected, of_x), strict=True):
        assert torch.equal(torch.from_numpy(found.astype(np.float32)), wanted.detach().float())


def test_not_a_number_is_chosen_as_xla_chooses_it():
    x = jax.numpy.asarray(np.random.default_rng(0).choice([np.nan, 0, 1, 2], (2, 3, 6, 6)), "float32")
    gradient = jax.numpy.ones((2, 3, 3, 3))
    for found, wanted in zip(results(artifact_of(pooled((2, 2)), x, gradient), x, gradient),
                             jax.jit(pooled((2, 2)))(x, gradient), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("settings", [{"window": (3, 3), "strides": (2, 2)}, {"window": (3, 3), "padding": "SAME"},
                                      {"window": (5, 5)}])
def test_windows_that_overlap_are_padded_or_are_large_are_left_to_xla(settings):
    x = jax.numpy.ones((1, 2, 10, 10))
    artifact = artifact_of(lambda x: lax.reduce_window(x, -np.inf, lax.max, (1, 1, *settings["window"]), (
        1, 1, *settings.get("strides", settings["window"])), settings.get("padding", "VALID")), x)
    assert plain_pooling(artifact) is artifact
