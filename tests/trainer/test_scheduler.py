"""A schedule sets the rate of every update, and goes on where it was in a run that is resumed."""

import logging

import pytest
import torch
from torch.optim import lr_scheduler

import tpuspec
from tests.models import input_fn, make_config, make_trainer
from tpuspec.errors import ConfigError, ConfigTypeError


def cosine(optimizer, params):
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)


def momentum_sgd(model, params):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


class Rates(tpuspec.SessionRunHook):
    def __init__(self, trainer_optimizers):
        self.rates, self._optimizers = [], trainer_optimizers

    def before_run(self, context):
        self.rates.append(self._optimizers[-1].param_groups[0]["lr"])


def scheduled_trainer(model_dir, made, *, use_tpu=True, scheduler=cosine):
    def optimizer(model, params):
        made.append(momentum_sgd(model, params))
        return made[-1]

    return make_trainer(model_dir, optimizer=optimizer, scheduler=scheduler, use_tpu=use_tpu, config=make_config(
        save_checkpoints_steps=100, tpu_config=tpuspec.TPUConfig(iterations_per_loop=1)))


def weights(trainer):
    return {name: trainer.get_variable_value(name).tolist() for name in trainer.get_variable_names()}


@pytest.mark.parametrize("use_tpu", [True, False])
def test_every_update_has_the_rate_of_torchs_own_schedule(use_tpu, tmp_path):
    made = []
    hook = Rates(made)
    scheduled_trainer(tmp_path, made, use_tpu=use_tpu).train(input_fn, hooks=[hook], max_steps=5)

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule, expected = cosine(optimizer, {}), []
    for _ in range(5):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert hook.rates == expected


def test_a_resumed_run_has_the_rates_and_weights_of_one_that_never_stopped(tmp_path, caplog):
    made, whole = [], []
    whole_hook, resumed_hook = Rates(whole), Rates(made)
    unbroken = scheduled_trainer(tmp_path / "whole", whole)
    unbroken.train(input_fn, hooks=[whole_hook], max_steps=5)

    scheduled_trainer(tmp_path / "parts", made).train(input_fn, max_steps=2)
    with caplog.at_level(logging.WARNING, "tpuspec"):
        resumed = scheduled_trainer(tmp_path / "parts", made)
        resumed.train(input_fn, hooks=[resumed_hook], max_steps=5)
    assert resumed_hook.rates == whole_hook.rates[2:]
    assert weights(resumed) == weights(unbroken)
    assert caplog.records == [], "the rate of the checkpoint is the schedule's"


def test_a_scheduler_needs_an_optimizer(tmp_path):
    with pytest.raises(ConfigError, match="scheduler needs an optimizer"):
        make_trainer(tmp_path, optimizer=None, scheduler=cosine)
    with pytest.raises(ConfigTypeError, match="scheduler must be a function of .optimizer, params."):
        make_trainer(tmp_path, scheduler=0.1)
