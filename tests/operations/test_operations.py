"""A sample of `make operations`: every operation that tpuspec has a formula for, and some of the others."""

from __future__ import annotations

import random

import pytest
import torch
import torch_xla

from tests.operations import samples, table
from tpuspec.tracer.formulas import register_formulas
from tpuspec.tracer.kernels import MENDED, register_kernels

NUM_OTHERS = 40
ENDS_THE_PROCESS = {"argwhere"}
OWN_TESTS = {"_weight_norm", "embedding_bag", "nuclear_norm"}
"""op_db has no samples of these; tests/tracer/test_formulas.py does."""
WITHIN_OTHERS = {"_linalg_svd", "tanh_backward", "sigmoid_backward", "_to_copy", "_copy_from", "view_as_complex_copy",
                 "linalg_vector_norm", "linalg_inv_ex", "upsample_nearest2d", "upsample_bilinear2d",
                 "_pack_padded_sequence", "randperm", "_index_put_impl", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d",
                 "nll_loss_forward", "nll_loss_backward", "nll_loss2d_forward", "nll_loss2d_backward",
                 "convolution_backward_overrideable", "native_layer_norm_backward",
                 "embedding_dense_backward"}
"""Kernels that other operations of op_db come to."""


def stem(overload):
    """exp_, exp.out and exp are one operation."""
    name = overload.partition(".")[0]
    return name.rstrip("_") or name


def registered():
    """Returns the names of overloads in aten that tpuspec has registered: aten/exp/XLA is one."""
    return {name.split("/")[1] for name in register_formulas()._op_impls | register_kernels()._op_impls}


def names(op):
    """Names in aten that an entry of op_db may stand for."""
    return {stem(name) for name in (op.aten_name, op.name.rpartition(".")[2], op.name.replace(".", "_").lstrip("_"),
                                    op.name, *(alias.name for alias in op.aliases))}


def with_formula():
    """Returns what comes to a formula, in float32 and another dtype, and what comes to a kernel, in one dtype."""
    formulas, mended = ({stem(name) for name in table} for table in (registered() - MENDED.keys(), MENDED))
    chosen = []
    for number, op in enumerate(samples.op_db):
        dtypes = [dtype for dtype in samples.DTYPES if getattr(torch, dtype) in op.dtypes]
        if dtypes and not formulas.isdisjoint(names(op)):
            chosen.append((number, dtypes[0]))
        if dtypes and not (formulas | mended).isdisjoint(names(op)):
            chosen.append((number, random.Random(op.name).choice(dtypes)))
    return chosen


def others():
    """Returns some variants of the others, the same ones each time."""
    left = [variant for variant in samples.variants() if samples.op_db[variant[0]].name not in ENDS_THE_PROCESS]
    return random.Random(12).sample(left, NUM_OTHERS)


def test_each_formula_has_samples():
    known = {name for op in samples.op_db for name in names(op)}
    assert {stem(name) for name in registered()} - known <= OWN_TESTS | WITHIN_OTHERS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("choose", [with_formula, others])
def test_samples_of_operations_are_right_or_refused(choose):
    register_formulas()
    register_kernels()
    device = torch_xla.device()
    faults = []
    for number, dtype in sorted(set(choose())):
        result = samples.run_variant(samples.op_db[number], getattr(torch, dtype), device, num_samples=2)
        if result["outcome"] in table.FAULTS:
            faults.append((samples.name_of(samples.op_db[number]), dtype, result["why"]))
    assert not faults
