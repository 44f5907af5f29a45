"""What minimize does to weights: against hand-written steps, with a reducer, clipping and accumulation."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn

from tpuspec.errors import ConfigError, ConfigTypeError, SpecError, SpecTypeError
from tpuspec.spec.train_op import (
    CrossShardOptimizer,
    TrainOp,
    as_train_op,
    check_train_op,
    only_reduced_steps,
    reduce_with,
)

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
}
every_optimizer = pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


class FakeReducer:
    """Stands for other replicas: multiplies the gradients by a factor, and steps."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.calls: list[tuple[torch.optim.Optimizer, str, list[Tensor]]] = []

    def reduce_gradients(self, optimizer: torch.optim.Optimizer, reduction: str) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.calls.append((optimizer, reduction, [g.clone() for g in gradients]))
        for gradient in gradients:
            gradient.mul_(self.factor)
        optimizer.step()


class FailingReducer:
    """Stands for a lost replica."""

    def reduce_gradients(self, optimizer: torch.optim.Optimizer, reduction: str) -> None:
        raise OSError("replica lost")


def make_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def make_batches(num: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(6, 4, generator=generator) for _ in range(num)]


def loss_of(net: nn.Module, batch: Tensor) -> Tensor:
    return (net(batch) - batch.sum(dim=1, keepdim=True)).square().mean()


def assert_same_weights(got: nn.Module, expected: nn.Module) -> None:
    for (name, a), b in zip(got.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b), name


def weight_with_gradient(*gradient: float) -> tuple[nn.Parameter, Tensor]:
    """A weight at zero, and a loss whose gradient in it is `gradient`."""
    weight = nn.Parameter(torch.zeros(len(gradient)))
    return weight, (weight * torch.tensor(gradient)).sum()


@every_optimizer
def test_minimize_equals_a_hand_written_step_bit_for_bit(make_optimizer):
    net, expected = make_net(), make_net()
    cross_shard, plain = CrossShardOptimizer(make_optimizer(net.parameters())), make_optimizer(expected.parameters())
    before = [p.detach().clone() for p in net.parameters()]
    for batch in make_batches(4):
        assert cross_shard.minimize(loss_of(net, batch)).run(0) is True
        plain.zero_grad()
        loss_of(expected, batch).backward()
        plain.step()
    assert_same_weights(net, expected)
    assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_minimize_runs_nothing_until_it_is_run():
    weight, loss = weight_with_gradient(1.0)
    CrossShardOptimizer(torch.optim.SGD([weight], lr=1.0)).minimize(loss)
    assert weight.grad is None
    assert weight.item() == 0.0


def test_gradients_are_dropped_after_the_update():
    weight, loss = weight_with_gradient(1.0)
    CrossShardOptimizer(torch.optim.SGD([weight], lr=1.0)).minimize(loss).run(0)
    assert weight.item() == -1.0
    assert weight.grad is None


@every_optimizer
def test_accumulating_two_batches_equals_one_step_on_the_mean_of_their_gradients(make_optimizer):
    net, expected = make_net(), make_net()
    cross_shard, plain = CrossShardOptimizer(make_optimizer(net.parameters())), make_optimizer(expected.parameters())
    batches = make_batches(4)
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        assert cross_shard.minimize(loss_of(net, first), accumulate_steps=2).run(0) is False
        assert cross_shard.minimize(loss_of(net, second), accumulate_steps=2).run(1) is True
        gradients = [torch.autograd.grad(loss_of(expected, batch), list(expected.parameters()))
                     for batch in (first, second)]
        for parameter, a, b in zip(expected.parameters(), *gradients, strict=True):
            parameter.grad = (a + b) / 2
        plain.step()
    assert_same_weights(net, expected)


def test_accumulation_leaves_the_weights_alone_and_reduces_once_at_the_last_batch():
    weight = nn.Parameter(torch.zeros(1))
    optimizer, reducer = CrossShardOptimizer(torch.optim.SGD([weight], lr=1.0)), FakeReducer()
    with reduce_with(reducer):
        for micro_step, gradient in enumerate((1.0, 2.0, 6.0)):
            is_update = optimizer.minimize((weight * gradient).sum(), accumulate_steps=3).run(micro_step)
            assert is_update is (micro_step == 2)
            assert len(reducer.calls) == (micro_step == 2)
            assert (weight.item() == 0.0) is (micro_step < 2)
    torch.testing.assert_close(weight.detach(), torch.tensor([-3.0]))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_reducer_gets_the_torch_optimizer_the_reduction_and_the_raw_gradients(reduction):
    weight, loss = weight_with_gradient(3.0, 4.0)
    optimizer, reducer = torch.optim.SGD([weight], lr=1.0), FakeReducer(factor=2.0)
    with reduce_with(reducer):
        CrossShardOptimizer(optimizer, reduction).minimize(loss, clip_grad_norm=100.0).run(0)
    ((got_optimizer, got_reduction, gradients),) = reducer.calls
    assert got_optimizer is optimizer
    assert got_reduction == reduction
    assert gradients[0].tolist() == [3.0, 4.0]
    assert weight.tolist() == [-6.0, -8.0]


def test_the_default_reduction_is_the_mean():
    weight, _ = weight_with_gradient(1.0)
    assert CrossShardOptimizer(torch.optim.SGD([weight], lr=1.0)).reduction == "mean"


def test_gradients_are_clipped_after_the_reduction():
    # Norm 5 on this replica, 50 reduced. Clipped before the reduction, the update would have norm 10.
    weight, loss = weight_with_gradient(3.0, 4.0)
    with reduce_with(FakeReducer(factor=10.0)):
        CrossShardOptimizer(torch.optim.SGD([weight], lr=1.0)).minimize(loss, clip_grad_norm=1.0).run(0)
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.6, -0.8]))


def test_gradients_that_the_reduction_brings_below_the_norm_are_not_clipped():
    # Norm 5 on this replica and above the limit, 0.5 reduced and below it.
    weight, loss = weight_with_gradient(3.0, 4.0)
    with reduce_with(FakeReducer(factor=0.1)):
        CrossShardOptimizer(torch.optim.SGD([weight], lr=1.0)).minimize(loss, clip_grad_norm=1.0).run(0)
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.3, -0.4]))


def test_clipping_takes_the_norm_over_all_parameters_of_all_groups():
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    unused = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [first, unused]}, {"params": [second]}], lr=1.0)
    loss = (first * 30.0 + second * 40.0).sum()
    CrossShardOptimizer(optimizer).minimize(loss, clip_grad_norm=5.0).run(0)
    torch.testing.assert_close(torch.cat([first, second]).detach(), torch.tensor([-3.0, -4.0]))


def test_clipping_applies_to_the_accumulated_gradient_as_a_whole():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = CrossShardOptimizer(torch.optim.SGD([weight], lr=1.0))
    for micro_step, gradient in enumerate((8.0, -6.0)):
        optimizer.minimize((weight * gradient).sum(), accumulate_steps=2, clip_grad_norm=2.0).run(micro_step)
    assert weight.item() == -1.0


@pytest.mark.parametrize("reducer", [None, FailingReducer()], ids=["after a step", "after a failed reduction"])
def test_clipping_does_not_outlive_its_step(reducer):
    weight, loss = weight_with_gradient(10.0)
    optimizer = CrossShardOptimizer(torch.optim.SGD([weight], lr=1.0))
    with contextlib.ExitStack() as stack:
        if reducer is not None:
            stack.enter_context(pytest.raises(OSError, match="replica lost"))
            stack.enter_context(reduce_with(reducer))
        optimizer.minimize(loss, clip_grad_norm=1.0).run(0)
    weight.data.zero_()
    weight.grad = torch.tensor([10.0])
    optimizer.step()
    assert weight.item() == -10.0


def test_the_innermost_reducer_is_used_and_the_outer_one_comes_back_even_after_an_error():
    weight, _ = weight_with_gradient(1.0)
    weight.grad = torch.ones(1)
    optimizer, outer, inner = CrossShardOptimizer(torch.optim.SGD([weight], lr=1.0)), FakeReducer(), FakeReducer()
    with reduce_with(outer):
        with pytest.raises(OSError, match="stop"), reduce_with(inner):
            optimizer.step()
            raise OSError("stop")
        optimizer.step()
    optimizer.step()
    assert (len(inner.calls), len(outer.calls)) == (1, 1)
    assert weight.item() == -3.0


def test_a_callable_train_op_may_step_several_optimizers_each_reduced_with_its_own_reduction():
    generator, discriminator = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer_g = CrossShardOptimizer(torch.optim.SGD([generator], lr=1.0))
    optimizer_d = CrossShardOptimizer(torch.optim.SGD([discriminator], lr=1.0), reduction="sum")

    def train_op():
        (generator * 2.0 + discriminator * 3.0).sum().backward()
        optimizer_d.step(clip_grad_norm=1.0)
        optimizer_g.step()

    reducer = FakeReducer()
    check_train_op(train_op)
    with reduce_with(reducer):
        as_train_op(train_op, torch.tensor(0.0))()
    assert [reduction for _, reduction, _ in reducer.calls] == ["sum", "mean"]
    torch.testing.assert_close(torch.cat([generator, discriminator]).detach(), torch.tensor([-2.0, -1.0]))


def test_steps_that_reduce_pass_and_others_are_refused_until_the_block_ends():
    weight, _ = weight_with_gradient(1.0)
    weight.grad = torch.ones(1)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    with only_reduced_steps():
        CrossShardOptimizer(optimizer).step()
        with pytest.raises(SpecError, match=r"must be used for model training.*train_op calls SGD\.step itself"):
            optimizer.step()
    assert weight.item() == -1.0
    optimizer.step()
    assert weight.item() == -2.0


@pytest.mark.parametrize("make", [
    CrossShardOptimizer, lambda optimizer: as_train_op(optimizer, torch.tensor(0.0))], ids=["cross shard", "bare"])
def test_an_optimizer_that_needs_a_closure_is_refused_with_the_way_to_give_it_one(make):
    optimizer = torch.optim.LBFGS([nn.Parameter(torch.zeros(1))])
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # which wraps the step
    with pytest.raises(ConfigError, match=r"LBFGS computes the loss repeatedly.*calls optimizer.step\(closure\)"):
        make(optimizer)


def test_zero_grad_drops_the_gradients():
    weight, loss = weight_with_gradient(1.0)
    loss.backward()
    assert weight.grad is not None
    CrossShardOptimizer(torch.optim.SGD([weight], lr=1.0)).zero_grad()
    assert weight.grad is None


@pytest.mark.parametrize(("wrap", "reduces"), [(CrossShardOptimizer, True), (lambda optimizer: optimizer, False)],
                         ids=["cross shard", "bare"])
def test_an_optimizer_as_train_op_means_minimize_of_the_loss(wrap, reduces):
    weight, loss = weight_with_gradient(2.0)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    train_op = as_train_op(wrap(optimizer), loss)
    assert isinstance(train_op, TrainOp)
    assert train_op.loss is loss
    assert train_op.torch_optimizer is optimizer
    assert train_op.reduces is reduces
    assert train_op.run(0) is True
    assert weight.item() == -2.0


def test_a_train_op_and_a_callable_stay_as_they_are():
    weight, loss = weight_with_gradient(2.0)
    made = CrossShardOptimizer(torch.optim.SGD([weight], lr=1.0)).minimize(loss)
    assert as_train_op(made, torch.tensor(0.0)) is made
    step = made.optimizer.step
    assert as_train_op(step, torch.tensor(0.0)) is step


def test_an_unknown_kind_is_refused_when_the_step_asks_for_it():
    with pytest.raises(SpecTypeError, match="without arguments; got str"):
        as_train_op("minimize", torch.tensor(0.0))


@pytest.mark.parametrize("wrapped", [None, "adam", torch.optim.SGD], ids=["None", "str", "class"])
def test_only_a_torch_optimizer_can_be_wrapped(wrapped):
    with pytest.raises(ConfigTypeError, match=r"CrossShardOptimizer takes a torch\.optim\.Optimizer"):
        CrossShardOptimizer(wrapped)


def test_an_optimizer_is_not_wrapped_twice():
    weight, _ = weight_with_gradient(1.0)
    with pytest.raises(ConfigTypeError, match="got CrossShardOptimizer"):
        CrossShardOptimizer(CrossShardOptimizer(torch.optim.SGD([weight], lr=1.0)))


@pytest.mark.parametrize("reduction", ["max", "", None])
def test_an_unknown_reduction_is_refused(reduction):
    weight, _ = weight_with_gradient(1.0)
    with pytest.raises(ConfigError, match=r"reduction must be one of \('mean', 'sum'\)"):
        CrossShardOptimizer(torch.optim.SGD([weight], lr=1.0), reduction)


@pytest.mark.parametrize(("setting", "value"), [
    *(("clip_grad_norm", value) for value in (0, -1.0, float("nan"), "1.0", [1.0])),
    *(("accumulate_steps", value) for value in (0, -2, 2.0, "2", True, None))])
def test_a_setting_of_minimize_that_is_not_positive_or_of_another_type_is_refused_by_name(setting, value):
    weight, loss = weight_with_gradient(1.0)
    with pytest.raises(ConfigError, match=f"{setting} must be"):
        CrossShardOptimizer(torch.optim.SGD([weight], lr=1.0)).minimize(loss, **{setting: value})
