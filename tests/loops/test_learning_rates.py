import math

import pytest
import torch
from torch.optim import lr_scheduler

from tpuspec.errors import ConfigError, ConfigTypeError
from tpuspec.loops.learning_rates import LearningRateSchedules

SCHEDULES = {
    "cosine": lambda optimizer, params: lr_scheduler.CosineAnnealingLR(optimizer, T_max=10),
    "one_cycle": lambda optimizer, params: lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=20),
    "sequential": lambda optimizer, params: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.ExponentialLR(optimizer, 0.9)],
        milestones=[3]),
    "multi_step": lambda optimizer, params: lr_scheduler.MultiStepLR(optimizer, milestones=[2, 4], gamma=0.5),
}


def make_sgd():
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9)


def rates_over(schedules, optimizer, num_steps):
    rates = []
    for _ in range(num_steps):
        optimizer.step()
        rates.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        schedules.step()
    return rates


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_moved_forward_or_back_has_the_rates_of_one_that_got_there(name):
    optimizer = make_sgd()
    expected = rates_over(LearningRateSchedules(SCHEDULES[name], {"": optimizer}, {}), optimizer, 8)
    assert len({rate for rate, _ in expected}) > 1

    resumed = make_sgd()
    schedules = LearningRateSchedules(SCHEDULES[name], {"": resumed}, {})
    schedules.move_to(5)
    assert rates_over(schedules, resumed, 3) == expected[5:]
    schedules.move_to(2)
    assert rates_over(schedules, resumed, 3) == expected[2:5]


def test_several_optimizers_have_schedules_of_their_own():
    optimizers = {"a": make_sgd(), "b": make_sgd()}
    schedules = LearningRateSchedules(
        lambda made, params: {"a": lr_scheduler.StepLR(made["a"], params["step_size"], gamma=0.5)}, optimizers,
        {"step_size": 1})
    for optimizer in optimizers.values():
        optimizer.step()
    schedules.step()
    assert [optimizers[name].param_groups[0]["lr"] for name in "ab"] == [0.05, 0.1]


def test_a_rate_that_is_a_tensor_is_put_back_too():
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=torch.tensor(0.1), capturable=False)
    schedules = LearningRateSchedules(lambda made, params: lr_scheduler.StepLR(made, 1, gamma=0.5), {"": optimizer}, {})
    schedules.move_to(3)
    assert math.isclose(float(optimizer.param_groups[0]["lr"]), 0.0125, rel_tol=1e-6)
    schedules.move_to(1)
    assert math.isclose(float(optimizer.param_groups[0]["lr"]), 0.05, rel_tol=1e-6)


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda optimizer, params: 0.1, ConfigTypeError, "scheduler must return a .*LRScheduler.*; got float"),
    (lambda optimizer, params: lr_scheduler.ReduceLROnPlateau(optimizer), ConfigTypeError, "follows a metric"),
    (lambda optimizer, params: lr_scheduler.StepLR(make_sgd(), 1), ConfigError, "that the Trainer did not make"),
])
def test_what_is_no_schedule_of_the_optimizer_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        LearningRateSchedules(make, {"": make_sgd()}, {})
