"""Every optimizer of torch.optim with its flags makes the update that plain PyTorch makes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

from tpuspec import RunConfig, TPUConfig, TPUEstimatorSpec, Trainer

NUM_STEPS = 50
ROWS = 4

PLAIN = {"foreach": {"foreach": True}, "maximize": {"maximize": True}, "weight_decay": {"weight_decay": 0.1}}
TENSOR = {"a tensor rate": {"lr": lambda: torch.tensor(0.001)}}
BETAS = {"beta1 of 0": {"betas": (0.0, 0.99)}, "beta2 of 0.5": {"betas": (0.9, 0.5)},
         "tensor betas": {"betas": lambda: (torch.tensor(0.9), torch.tensor(0.99)), "lr": lambda: torch.tensor(0.01)}}
ADAM = PLAIN | TENSOR | BETAS | {"fused": {"fused": True}, "amsgrad": {"amsgrad": True},
                                 "amsgrad and decay": {"amsgrad": True, "weight_decay": 0.1, "maximize": True}}
FLAGS = {
    "SGD": PLAIN | TENSOR | {
        "momentum": {"momentum": 0.9}, "nesterov": {"momentum": 0.9, "nesterov": True}, "fused": {"fused": True},
        "dampening": {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}},
    "Adam": ADAM | {"decoupled": {"decoupled_weight_decay": True, "weight_decay": 0.1}},
    "AdamW": ADAM,
    "Adamax": PLAIN | TENSOR | {"beta1 of 0": BETAS["beta1 of 0"], "beta2 of 0.5": BETAS["beta2 of 0.5"]},
    "NAdam": PLAIN | {"decoupled": {"decoupled_weight_decay": True, "weight_decay": 0.1},
                               "beta1 of 0": BETAS["beta1 of 0"], "momentum decay": {"momentum_decay": 0.1}},
    "RAdam": PLAIN | {"decoupled": {"decoupled_weight_decay": True, "weight_decay": 0.1},
                               "beta1 of 0": BETAS["beta1 of 0"]},
    "ASGD": PLAIN | {"averages": {"t0": 10.0, "lambd": 0.01, "alpha": 0.5}},
    "Rprop": {"foreach": {"foreach": True}, "maximize": {"maximize": True}, "etas": {"etas": (0.4, 1.3)}},
    "RMSprop": PLAIN | TENSOR | {
        "momentum": {"momentum": 0.9}, "centered": {"centered": True}, "alpha of 0": {"alpha": 0.0},
        "centered momentum": {"centered": True, "momentum": 0.5}},
    "Adadelta": PLAIN | {"rho of 0": {"rho": 0.0}},
    "Adagrad": PLAIN | {"lr_decay": {"lr_decay": 0.1}, "fused": {"fused": True},
                                 "accumulator": {"initial_accumulator_value": 0.1}},
    "Adafactor": PLAIN | {"beta2_decay": {"beta2_decay": -0.5}, "d": {"d": 2.0}},
    "Muon": {"nesterov": {"nesterov": False}, "adjusted": {"adjust_lr_fn": "match_rms_adamw"},
             "weight_decay": {"weight_decay": 0.5}},
}
RATE = {"RMSprop": 0.001, "Muon": 0.001}
"""It begins with tenfold steps, and rounding grows with them."""

SCHEDULES = {
    "no schedule": None,
    "warm-up from 0": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10)),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(
        optimizer, 2 * optimizer.defaults["lr"], total_steps=NUM_STEPS + 1,
        cycle_momentum=any(key in optimizer.defaults for key in ("momentum", "betas"))),
}


class Rows(nn.Module):
    """A table of which some rows are used late or never, and a layer."""

    def __init__(self, *, bias):
        super().__init__()
        self.table = nn.Embedding(8, 3)
        self.layer = nn.Linear(3, 2, bias=bias)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(0.1)

    def forward(self, x):
        return self.layer(self.table(x)).sin()


def make_optimizer(kind, flags, model, schedule):
    made = {"lr": RATE.get(kind, 0.01)} | {key: value() if callable(value) else value for key, value in flags.items()}
    return getattr(torch.optim, kind)(model.parameters(), **made)


def trained(use_tpu, kind, schedule, folder):
    """Trains one module a combination of flags, all in one step; returns their weights and the Trainer."""
    torch.manual_seed(0)
    flags = {"plain": {}} | FLAGS[kind]
    names = {name: str(i) for i, name in enumerate(flags)}

    def make_model(params):
        return nn.ModuleDict({number: Rows(bias=kind != "Muon") for number in names.values()})

    def make_optimizers(model, params):
        return {name: make_optimizer(kind, flags[name], model[number], schedule) for name, number in names.items()}

    def make_schedules(optimizers, params):
        return {name: SCHEDULES[schedule](optimizer) for name, optimizer in optimizers.items()}

    def model_fn(features, labels, mode, params, model, optimizer):
        losses = [F.mse_loss(part(features), labels) for part in model.values()]
        loss = torch.stack(losses).sum()

        def train_op():
            loss.backward()
            for one in optimizer.values():
                one.step()
                one.zero_grad()

        return TPUEstimatorSpec(mode, loss=loss, train_op=train_op)

    def input_fn(params):
        generator = torch.Generator().manual_seed(1)
        drawn = [(torch.randint(0, 3 + number, (ROWS,), generator=generator),
                  torch.randn(ROWS, 2, generator=generator)) for number in range(5)]
        return itertools.islice(itertools.cycle(drawn), NUM_STEPS)

    trainer = Trainer(
        model_fn, model=make_model, optimizer=make_optimizers, train_batch_size=ROWS, use_tpu=use_tpu,
        scheduler=None if SCHEDULES[schedule] is None else make_schedules, model_dir=folder / str(use_tpu),
        config=RunConfig(seed=5, show_progress=False, capture="require" if use_tpu else "auto",
                         save_checkpoints_steps=None, save_checkpoints_secs=None,
                         tpu_config=TPUConfig(iterations_per_loop=25)))
    trainer.train(input_fn, max_steps=NUM_STEPS)
    return trainer._sessions[use_tpu].model_state(), names, trainer


@pytest.fixture
def exact(request, monkeypatch):
    """Muon computes in bfloat16, whose rounding differs; its formula shows in the weights' own dtype."""
    if "Muon" in request.node.name:
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", FLAGS)
def test_an_optimizer_makes_plain_pytorchs_update(kind, schedule, tmp_path):
    expected, names, _ = trained(False, kind, schedule, tmp_path)
    state, _, trainer = trained(True, kind, schedule, tmp_path)
    assert trainer._sessions[True].backend.step_kind == "replay"
    different = {}
    for name, number in names.items():
        for key, value in expected.items():
            if key.startswith(f"{number}."):
                difference = (state[key] - value).abs().max().item()
                if not difference <= 1e-6:
                    different[f"{name}: {key}"] = difference
    assert different == {}
