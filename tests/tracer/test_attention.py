"""Attention on XLA against torch's own on the CPU: outputs and gradients, and what it leaves to torch."""

from __future__ import annotations

import math

import pytest
import torch
import torch_xla
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tpuspec.tracer import graph
from tpuspec.tracer.formulas import register_formulas
from tpuspec.tracer.kernels import register_kernels

QUERIES, KEYS = 7, 9
SEEN = torch.rand(QUERIES, KEYS, generator=torch.Generator().manual_seed(1)) > 0.4
SEEN[2] = False  # a row that sees nothing
ADDED = torch.randn(2, 1, QUERIES, KEYS, generator=torch.Generator().manual_seed(2))
ADDED[0, 0, 1] = -math.inf


@pytest.fixture(autouse=True)
def registered():
    register_formulas()
    register_kernels()
    torch.autograd.set_multithreading_enabled(False)
    yield
    torch.autograd.set_multithreading_enabled(True)


def attend(device, dtype, settings, *, autocast=False, twice=False):
    """Returns output and gradients, and the dtype of the output."""
    generator = torch.Generator().manual_seed(0)
    num_groups, width = (2, 16) if settings.get("enable_gqa") else (4, 19)
    q, k, v = (torch.randn(2, *shape, generator=generator).to(device, dtype).requires_grad_() for shape in (
        (4, QUERIES, 16), (num_groups, KEYS, 16), (num_groups, KEYS, width)))
    settings = {name: value.to(device) if isinstance(value, torch.Tensor) else value
                for name, value in settings.items()}
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=autocast), sdpa_kernel(
            SDPBackend.MATH) if twice else sdpa_kernel(list(SDPBackend.__members__.values())):
        out = functional.scaled_dot_product_attention(q, k, v, **settings)
    weights = torch.randn(out.shape, generator=generator).to(device, out.dtype)
    gradients = torch.autograd.grad(out, (q, k, v), weights, create_graph=twice)
    if twice:
        gradients = torch.autograd.grad(sum(one.square().sum() for one in gradients), (q, k, v))
    return [one.detach() for one in (out, *gradients)]


CASES = [
    (torch.float32, {}, {}),
    (torch.float32, {"is_causal": True}, {}),
    (torch.float32, {"attn_mask": SEEN}, {}),
    (torch.float32, {"attn_mask": ADDED, "scale": 0.3}, {}),
    (torch.float32, {"enable_gqa": True}, {}),
    (torch.float32, {"is_causal": True}, {"twice": True}),
    (torch.float64, {"is_causal": True}, {}),
    (torch.bfloat16, {"is_causal": True}, {}),
    (torch.float16, {"attn_mask": SEEN}, {}),
    (torch.float32, {"is_causal": True}, {"autocast": True})]


def test_output_and_gradients_are_torchs():
    wanted, got = ([attend(device, dtype, settings, **more) for dtype, settings, more in CASES]
                   for device in ("cpu", torch_xla.device()))
    fetched = iter(graph.fetch([one for outcome in got for one in outcome]))  # one program of all
    for case, outcome in zip(CASES, wanted, strict=True):
        is_half = bool(case[2].get("autocast")) or case[0].itemsize == 2
        for want in outcome:
            torch.testing.assert_close(next(fetched), want, rtol=0, atol=0.04 if is_half else 2e-5,
                                       msg=lambda text, case=case: f"{case}: {text}")


def test_the_backward_pass_reads_no_matrix_of_queries_and_keys():
    q, k, v = (torch.randn(2, 3, 40, 8, device=torch_xla.device(), requires_grad=True) for _ in range(3))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    kept = [one for one in out.grad_fn.saved_tensors if one is not None]
    assert len(kept) == 5 and max(one.numel() for one in kept) == q.numel()


def test_a_mask_that_learns_has_its_gradient_and_dropout_drops():
    device = torch_xla.device()
    q, k, v = (torch.ones(1, 1, 4, 8, device=device) for _ in range(3))
    mask = torch.zeros(4, 4, device=device, requires_grad=True)
    functional.scaled_dot_product_attention(q, k, v.cumsum(-2), mask).sum().backward()
    assert mask.grad is not None and mask.grad.cpu().abs().max() > 0.1
    dropped = functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    assert (graph.fetch([dropped])[0] != 1).any()
