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
    (lambda optimizer, params: lr_scheduler.StepLR(make_sgd(), 1), ConfigError, "that the Trainer did not make"),
])
def test_what_is_no_schedule_of_the_optimizer_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        LearningRateSchedules(make, {"": make_sgd()}, {})


def plateau(made, params):
    return {"accuracy": lr_scheduler.ReduceLROnPlateau(made, mode="max", factor=0.5, patience=1),
            "warm-up": lr_scheduler.LinearLR(made, start_factor=0.1, total_iters=4)}


ACCURACIES = {2: 0.5, 4: 0.4, 6: 0.45, 8: 0.6, 10: 0.1, 12: 0.1, 14: 0.1}


def plain_plateau_rates():
    """By torch alone: the rate of each update."""
    optimizer = make_sgd()
    made = plateau(optimizer, {})
    rates = []
    for step in range(16):
        if step in ACCURACIES:
            made["accuracy"].step(ACCURACIES[step])
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made["warm-up"].step()
    return rates


@pytest.mark.parametrize("resumed_at", [None, 3, 6, 14])
def test_a_plateau_follows_evaluations_and_in_a_resumed_run_their_log(resumed_at):
    expected = plain_plateau_rates()
    assert len(set(expected[4:])) > 2
    log = {}
    optimizer = make_sgd()
    schedules = LearningRateSchedules(plateau, {"": optimizer}, {}, lambda name: log if name is None else {})
    rates = []
    for step in range(16):
        if step in ACCURACIES:
            log[step] = {"accuracy": ACCURACIES[step], "loss": 0.0}
            schedules.evaluated(step, None, log[step])
            schedules.evaluated(step, None, log[step])  # once a step
            schedules.evaluated(step, "other", {})
            schedules.evaluated(step - 1, None, {"accuracy": 0.0})  # an older checkpoint
        if step == resumed_at:
            optimizer = make_sgd()
            schedules = LearningRateSchedules(plateau, {"": optimizer}, {}, lambda name: log if name is None else {})
            schedules.move_to(step)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedules.step()
    assert rates == expected
    schedules.move_to(7)
    assert optimizer.param_groups[0]["lr"] == expected[7]


def test_a_plateau_follows_an_evaluation_by_name_and_wants_its_metric():
    optimizer = make_sgd()
    schedules = LearningRateSchedules(
        lambda made, params: {"test/loss": lr_scheduler.ReduceLROnPlateau(made, patience=0)}, {"": optimizer}, {})
    schedules.evaluated(0, "test", {"loss": 1.0})
    schedules.evaluated(0, None, {"loss": 2.0})
    optimizer.step()
    schedules.step()
    schedules.evaluated(1, None, {"loss": 2.0})
    assert optimizer.param_groups[0]["lr"] == 0.1
    schedules.evaluated(1, "test", {"loss": 2.0})
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    alone = LearningRateSchedules(lambda made, params: lr_scheduler.ReduceLROnPlateau(made), {"": make_sgd()}, {})
    with pytest.raises(ConfigError, match="follows 'loss', and the evaluation has"):
        alone.evaluated(0, None, {"accuracy": 0.5})
