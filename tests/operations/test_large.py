"""What torch's own small samples do not show: long sums of halves, and integers that float32 does not have."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch_xla

from tpuspec.tracer.formulas import register_formulas
from tpuspec.tracer.kernels import register_kernels

N = 4096


def numbers(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5


def zeros(x, *shape):
    return torch.zeros(*shape, dtype=torch.int64, device=x.device)


HALVES = {
    "sum": (lambda x: x.sum(), [(N,)]),
    "sum over two dims": (lambda x: x.sum((0, 2)), [(64, 3, 64)]),
    "mean over two dims": (lambda x: x.mean((0, 2)), [(64, 3, 64)]),
    "var": (lambda x: x.var((0, 2)), [(64, 3, 64)]),
    "std": (lambda x: x.std(), [(64, 3, 64)]),
    "norm": (lambda x: x.norm(dim=(0, 2)), [(64, 3, 64)]),
    "logsumexp": (lambda x: torch.logsumexp(x, (0, 2)), [(64, 3, 64)]),
    "nansum": (lambda x: x.nansum((0, 2)), [(64, 3, 64)]),
    "linear of rows in two dims": (F.linear, [(64, 64, 3), (2, 3), (2,)]),
    "a bias": (lambda x, b: x + b, [(64, 64, 3), (3,)]),
    "conv1d": (F.conv1d, [(16, 2, 300), (2, 2, 3), (2,)]),
    "conv2d": (F.conv2d, [(8, 2, 32, 32), (2, 2, 3, 3), (2,)]),
    "conv3d": (F.conv3d, [(2, 2, 16, 16, 16), (2, 2, 3, 3, 3), (2,)]),
    "conv_transpose2d": (F.conv_transpose2d, [(8, 2, 32, 32), (2, 2, 3, 3), (2,)]),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (3,), w, b), [(64, 64, 3), (3,), (3,)]),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b), [(64, 4, 64), (4,), (4,)]),
    "batch_norm": (lambda x, w, b: F.batch_norm(x, None, None, w, b, True), [(64, 4, 64), (4,), (4,)]),
    "rms_norm": (lambda x, w: F.rms_norm(x, (3,), w), [(64, 64, 3), (3,)]),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 32), [(1, 2, 32, 32)]),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, 1), [(1, 2, 64, 64)]),
    "cross_entropy": (lambda x: F.cross_entropy(x, zeros(x, N)), [(N, 5)]),
    "cross_entropy of pixels": (lambda x: F.cross_entropy(x, zeros(x, 4, 32, 32)), [(4, 5, 32, 32)]),
    "mse_loss": (lambda x: F.mse_loss(x, -x.detach(), reduction="sum"), [(64, 64)]),
    "smooth_l1_loss": (lambda x: F.smooth_l1_loss(x, x.detach() - 2, reduction="sum"), [(64, 64)]),
    "binary_cross_entropy": (lambda x: F.binary_cross_entropy(x / 2, x.detach() / 2), [(64, 64)]),
    "binary_cross_entropy_with_logits": (
        lambda x: F.binary_cross_entropy_with_logits(x, torch.ones_like(x), reduction="sum"), [(64, 64)]),
    "l1_loss": (lambda x: F.l1_loss(x, x.detach() - 2, reduction="sum"), [(64, 64)]),
    "embedding": (lambda w: F.embedding(zeros(w, 64, 64), w), [(3, 4)]),
    "index_select": (lambda x: x.index_select(0, zeros(x, N)), [(3, 4)]),
    "indexing": (lambda x: x[zeros(x, N)], [(3, 4)]),
    "gather": (lambda x: x.gather(0, zeros(x, N, 4)), [(3, 4)]),
    "index_add": (lambda x: torch.zeros_like(x[:3]).index_add(0, zeros(x, N), x), [(N, 4)]),
    "index_add_": (lambda x: torch.zeros_like(x[:3]).index_add_(0, zeros(x, N), x), [(N, 4)]),
    "scatter_add": (lambda x: torch.zeros_like(x[:3]).scatter_add(0, zeros(x, N, 4), x), [(N, 4)]),
    "scatter_reduce": (lambda x: torch.zeros_like(x[:3]).scatter_reduce(0, zeros(x, N, 4), x, "sum"), [(N, 4)]),
    "index_put": (lambda x: torch.zeros_like(x[:3]).index_put((zeros(x, N),), x, accumulate=True), [(N, 4)]),
    "a product of matrices": (lambda x, y: x @ y, [(3, N), (N, 2)]),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", HALVES)
def test_halves_add_up_as_on_the_cpu(case, dtype):
    register_formulas()
    register_kernels()
    function, shapes = HALVES[case]
    inputs = [numbers(*shape).to(dtype) for shape in shapes]
    results = []
    for to in (lambda x: x.double(), lambda x: x, lambda x: x.to(torch_xla.device())):
        leaves = [to(x).detach().requires_grad_() for x in inputs]
        with torch.autograd.set_multithreading_enabled(False):
            try:
                out = function(*leaves)
                found = [out, *torch.autograd.grad(out, leaves, to(numbers(*out.shape).to(dtype)))]
            except NotImplementedError as error:
                pytest.skip(f"the CPU has it not: {error}")
        results.append([one.detach().cpu().double() for one in found])
        assert all(one.dtype is leaves[0].dtype for one in found)
    for expected, on_cpu, on_xla in zip(*results, strict=True):
        scale = max(1e-3, expected.abs().max().item())
        error, error_of_cpu = ((one - expected).abs().max().item() / scale for one in (on_xla, on_cpu))
        assert error <= max(0.03, 1.5 * error_of_cpu), (error, error_of_cpu)


INTEGERS = {
    "//": lambda x, y: x // y,
    "// number": lambda x, y: x // 3,
    "// below zero": lambda x, y: x // -7,
    "number //": lambda x, y: 101 // y,
    "div, trunc": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    "div, floor": lambda x, y: torch.div(x, -y, rounding_mode="floor"),
    "floor_divide_": lambda x, y: x.clone().floor_divide_(y),
    "broadcast": lambda x, y: x[:, None] // y[None, :2, :1],
    "%": lambda x, y: x % y,
    "@": lambda x, y: (x // 64) @ (y.T % 2),
    "@ vector": lambda x, y: (x // 64) @ (y[0] % 2),
    "dot": lambda x, y: torch.dot(x[0] // 64, y[0] % 2),
    "bmm": lambda x, y: (x // 64)[None] @ (y.T % 2)[None],
    "sum": lambda x, y: x.sum(1),
    "cumsum": lambda x, y: x.cumsum(1),
    "sort": lambda x, y: x.sort(1)[0],
    "eq": lambda x, y: x == x.flatten()[0] + 1,
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
@pytest.mark.parametrize("case", INTEGERS)
def test_large_integers_are_exact(case, dtype):
    register_kernels()
    generator, most = torch.Generator().manual_seed(0), torch.iinfo(dtype).max // 2
    x = torch.randint(0 if dtype is torch.uint8 else -most, most, (4, 5), generator=generator).to(dtype)
    y = torch.randint(1, min(most, 1000), (4, 5), generator=generator).to(dtype)
    try:
        expected = INTEGERS[case](x, y)
    except RuntimeError as error:
        pytest.skip(f"torch has it not: {error}")
    found = INTEGERS[case](x.to(torch_xla.device()), y.to(torch_xla.device())).cpu()
    assert found.dtype is expected.dtype
    assert torch.equal(found, expected)


def test_a_division_of_integers_by_the_number_0_is_an_error_as_in_torch():
    register_kernels()
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        torch.ones(2, dtype=torch.int64, device=torch_xla.device()) // 0


@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize("name", ["argmax", "argmin"])
def test_the_first_nan_is_the_most_and_the_least(name, dim):
    register_kernels()
    x = torch.tensor([[1.0, 5.0, float("nan")], [float("inf"), 2.0, -3.0], [0.0, float("nan"), float("nan")]])
    assert torch.equal(getattr(x.to(torch_xla.device()), name)(dim).cpu(), getattr(x, name)(dim))


@pytest.mark.parametrize("function", [
    lambda x: x.mean(dtype=torch.float32), lambda x: x.mean(0, dtype=torch.float32),
    lambda x: x.sum(dtype=torch.float32),
    lambda x: x.prod(dtype=torch.float32), lambda x: torch.linalg.vector_norm(x, dtype=torch.float32),
    lambda x: F.mse_loss(x, torch.zeros_like(x, dtype=torch.float32)),
    lambda x: F.smooth_l1_loss(x, torch.zeros_like(x, dtype=torch.float32)),
    lambda x: F.binary_cross_entropy_with_logits(x, torch.zeros_like(x, dtype=torch.float32)),
    lambda x: x.mean(), lambda x: x.float().mean(dtype=torch.bfloat16)])
def test_sums_of_halves_have_the_dtype_of_torch(function):
    register_formulas()
    register_kernels()
    x = numbers(4, 5).to(torch.bfloat16)
    expected, found = function(x), function(x.to(torch_xla.device())).cpu()
    assert found.dtype is expected.dtype
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-3)


def test_a_division_of_integers_by_the_number_0_of_floats_is_infinite_as_in_torch():
    register_kernels()
    x = torch.tensor([2, -2])
    assert torch.equal((x.to(torch_xla.device()) // 0.0).cpu(), x // 0.0)
