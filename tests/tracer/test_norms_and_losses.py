"""Layer norm and cross-entropy on XLA: torch's values and gradients, and no matrices of ones and zeros."""

from __future__ import annotations

import pytest
import torch
import torch_xla
from torch.nn import functional as F

from tpuspec.tracer import graph
from tpuspec.tracer.formulas import register_formulas
from tpuspec.tracer.kernels import register_kernels


@pytest.fixture(autouse=True)
def _registered():
    register_formulas()
    register_kernels()
    # As the Trainer does: torch's threads know XLA only if it started before the first backward of the process.
    with torch.autograd.set_multithreading_enabled(False):
        yield


def outcome(function, given, device):
    """Returns the result, its gradients, and those of their sizes."""
    given = [one.detach().to(device).requires_grad_(one.is_floating_point()) for one in given]
    floats = [one for one in given if one.requires_grad]
    out = function(*given)
    weights = torch.arange(1, out.numel() + 1, device=device).reshape(out.shape).to(out.dtype)
    first = torch.autograd.grad((out * weights).sum(), floats, create_graph=True)
    sizes = sum(one.square().sum() for one in first)
    second = torch.autograd.grad(sizes, floats, allow_unused=True) if sizes.requires_grad else ()
    return [None if one is None else one.detach().cpu() for one in (out, *first, *second)]


def assert_torchs(function, *given):
    for found, wanted in zip(outcome(function, given, torch_xla.device()), outcome(function, given, "cpu"),
                             strict=True):
        size = 1.0 if wanted is None else float(wanted.abs().max())
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * max(1.0, size))


@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 5, 7)])
def test_layer_norm_of_any_number_of_dims_and_its_gradients_are_torchs(shape):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 7) * 3 + 2
    assert_torchs(lambda x: F.layer_norm(x, shape), x)
    assert_torchs(lambda x, weight: F.layer_norm(x, shape, weight), x, torch.randn(shape))
    assert_torchs(lambda x, weight, bias: F.layer_norm(x, shape, weight, bias), x, torch.randn(shape),
                  torch.randn(shape))


def test_layer_norm_of_rows_far_from_zero_keeps_its_digits():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) + 1000
    exact = F.layer_norm(x.double(), (64,)).float()
    torch.testing.assert_close(F.layer_norm(x.to(torch_xla.device()), (64,)).cpu(), exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("sizes", [(6, 10), (2, 10, 3, 4), (10,)])
def test_the_cross_entropy_of_rows_and_of_pixels_with_and_without_weights_is_torchs(reduction, sizes):
    torch.manual_seed(0)
    x, weight = torch.randn(sizes), torch.rand(10)
    target = torch.randint(0, 10, [size for dim, size in enumerate(sizes) if dim != min(1, len(sizes) - 1)])
    ignored = torch.where(torch.rand(target.shape) < 0.3, -100, target)
    for labels, ignore_index in ((target, -100), (target, 3), (ignored, -100)):
        for of_class in (None, weight):
            assert_torchs(lambda x, labels, of_class=of_class, ignore_index=ignore_index: F.cross_entropy(
                x, labels, None if of_class is None else of_class.to(x.device), ignore_index=ignore_index,
                reduction=reduction), x, labels)


def test_rows_that_are_all_ignored_have_no_mean_and_no_gradient():
    labels = torch.full((4,), -100)
    (on_xla, of_x), (on_cpu, of_cpu) = (
        outcome(lambda x: F.cross_entropy(x, labels.to(x.device)), [torch.zeros(4, 3)], device)[:2]
        for device in (torch_xla.device(), "cpu"))
    assert on_xla.isnan() and on_cpu.isnan()
    assert torch.equal(of_x, of_cpu)


def test_infinite_logits_of_other_classes_do_not_reach_the_loss():
    x = torch.tensor([[0.5, -float("inf"), 0.25]])
    assert_close = torch.testing.assert_close
    for device in ("cpu", torch_xla.device()):
        assert_close(F.nll_loss(x.to(device), torch.tensor([0], device=device)).cpu(), torch.tensor(-0.5))


def test_the_program_of_a_loss_does_not_grow_with_the_classes():
    sizes = []
    for num_classes in (16, 4096):
        x = graph.send([torch.zeros(4, num_classes)], str(torch_xla.device()))[0].requires_grad_()
        (labels,) = graph.send([torch.zeros(4, dtype=torch.long)], str(torch_xla.device()))
        loss = F.cross_entropy(x, labels)
        sizes.append(len(graph.stablehlo([loss, *torch.autograd.grad(loss, x)])))
    assert sizes[1] < sizes[0] + 200
