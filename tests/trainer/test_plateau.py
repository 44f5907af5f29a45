"""ReduceLROnPlateau as the Trainer's scheduler: it follows evaluations, of this run and of those before."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from tpuspec import (
    CrossShardOptimizer,
    EvalSpec,
    ModeKeys,
    RunConfig,
    TPUConfig,
    TPUEstimatorSpec,
    Trainer,
    TrainSpec,
    train_and_evaluate,
)
from tpuspec.errors import ConfigError

RATES: list[float] = []


def model_fn(features, labels, mode, params, model, optimizer):
    logits = model(features)
    loss = F.cross_entropy(logits, labels)
    if mode is ModeKeys.EVAL:
        return TPUEstimatorSpec(mode, loss=loss)
    rate = torch.as_tensor(optimizer.param_groups[0]["lr"]).reshape(1)
    return TPUEstimatorSpec(
        mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss),
        host_call=(lambda rate: RATES.append(round(float(rate[0]), 6)), [rate]))


def rows(params):
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(8, 4, generator=generator), torch.randint(0, 3, (8,), generator=generator)
    return [(features, labels)] * 40


def few_rows(params):
    return rows(params)[:2]


def make_trainer(folder, *, use_tpu):
    torch.manual_seed(0)
    return Trainer(
        model_fn, model=nn.Linear(4, 3), model_dir=str(folder), use_tpu=use_tpu, train_batch_size=8, eval_batch_size=8,
        optimizer=lambda model, params: torch.optim.SGD(model.parameters(), lr=1.0),
        # The loss falls, so that in mode 'max' each evaluation is no better than the first.
        scheduler=lambda optimizer, params: ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=1),
        config=RunConfig(show_progress=False, save_checkpoints_steps=3, save_checkpoints_secs=None,
                         capture="require" if use_tpu else "auto", tpu_config=TPUConfig(iterations_per_loop=3)))


def run(trainer, max_steps):
    train_and_evaluate(trainer, TrainSpec(rows, max_steps), EvalSpec(few_rows, throttle_secs=0))
    return {name: trainer.get_variable_value(name) for name in trainer.get_variable_names()}


def plain_rates(num_steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=1)
    rates = []
    for step in range(num_steps):
        if step and step % 3 == 0:
            schedule.step(-step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


@pytest.mark.parametrize("use_tpu", [False, True])
def test_the_rate_falls_where_the_evaluation_says_so_and_a_resumed_run_goes_on_alike(use_tpu, tmp_path, caplog):
    RATES.clear()
    whole = run(make_trainer(tmp_path / "whole", use_tpu=use_tpu), 24)
    assert plain_rates(24) == RATES
    assert len(set(RATES)) > 2
    assert "was captured" not in caplog.text
    RATES.clear()
    for max_steps in (9, 15, 24):
        resumed = run(make_trainer(tmp_path / "resumed", use_tpu=use_tpu), max_steps)
    assert plain_rates(24) == RATES
    for name, value in whole.items():
        assert (resumed[name] == value).all(), name


def test_a_plateau_over_an_address_is_refused(tmp_path):
    trainer = make_trainer("memory://plateau", use_tpu=False)
    with pytest.raises(ConfigError, match="history of evaluations is read from"):
        trainer.train(rows, max_steps=2)
