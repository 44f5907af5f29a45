"""The tables of docs/capture.md: which optimizers and schedules are replayed, each with the bits of the traced run."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

from tests.tracer.test_capture import RECORDED, assert_same, batches, classify, kind, rows, run, sgd
from tpuspec import TPUEstimatorSpec
from tpuspec.errors import CaptureError

PAGE = (Path(__file__).parent.parent.parent / "docs/capture.md").read_text()
OPTIMIZERS = re.findall(r"^\| (\w+) \| (replay|traced) \| (replay|traced) \|$", PAGE, re.MULTILINE)
SCHEDULES = re.findall(r"^\| (\w+) \| (replay|traced) \|$", PAGE, re.MULTILINE)

MADE = {
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 3),
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 0.9 ** step),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 50),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 5),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.1),
}


def check(expected, make_optimizer, tmp_path, *, bias=True, **arguments):
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=bias)
    traced, captured = (run(capture, classify, model, make_optimizer, batches(rows), tmp_path, steps=12, **arguments)
                        for capture in ("off", "auto"))
    assert kind(captured[2]) == expected
    assert_same(traced, captured)


@pytest.mark.parametrize(("name", "alone", "scheduled"), OPTIMIZERS, ids=[name for name, *_ in OPTIMIZERS])
def test_an_optimizer_runs_as_the_page_says(name, alone, scheduled, tmp_path):
    def make(model, params):
        return getattr(torch.optim, name)(model.parameters(), lr=0.01)

    bias = name != "Muon"  # which takes matrices only
    check(alone, make, tmp_path, bias=bias)
    check(scheduled, make, tmp_path, bias=bias,
          scheduler=lambda optimizer, params: MADE["CosineAnnealingLR"](optimizer))


@pytest.mark.parametrize(("name", "expected"), SCHEDULES, ids=[name for name, _ in SCHEDULES])
def test_a_schedule_runs_as_the_page_says(name, expected, tmp_path):
    check(expected, sgd, tmp_path, scheduler=lambda optimizer, params: MADE[name](optimizer))


def least_squares(features, labels, mode, params, model, optimizer):
    """LBFGS evaluates the loss in its step as often as it needs."""
    def loss_of_weights():
        optimizer.zero_grad()
        loss = F.mse_loss(model(features), F.one_hot(labels, 3).float())
        loss.backward()
        return loss

    def train_op():
        optimizer.step(loss_of_weights)
        optimizer.zero_grad()

    loss = F.mse_loss(model(features), F.one_hot(labels, 3).float())
    return TPUEstimatorSpec(mode, loss=loss, train_op=train_op,
                            host_call=(lambda loss: RECORDED.extend(loss.tolist()), [loss.reshape(1)]))


def test_lbfgs_by_a_train_op_function_is_traced_and_equals_plain_torch(tmp_path, caplog):
    def lbfgs(model, params):
        # Each length of the history is a graph to compile.
        return torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=3, history_size=1)

    model = nn.Linear(4, 3)
    arguments = (least_squares, model, lbfgs, batches(rows, num_batches=1), tmp_path)
    traced = run("off", *arguments, steps=6)
    captured = run("auto", *arguments, steps=6)
    assert_same(traced, captured)
    assert kind(captured[2]) == "traced"
    (told,) = [record.message for record in caplog.records if "cannot be captured" in record.message]
    assert re.search(r"reads a value from the device at test_optimizers\.py:\d+", told)
    with pytest.raises(CaptureError, match="reads a value from the device"):
        run("require", *arguments, steps=6)

    features, labels = next(batches(rows, num_batches=1)({}))
    plain = copy.deepcopy(model)
    optimizer, losses = lbfgs(plain, {}), []
    for _ in range(6):
        spec = least_squares(features, labels, "train", {}, plain, optimizer)
        losses.append(spec.loss.item())
        spec.train_op()
    assert losses[-1] < 0.5 * losses[0]
    assert captured[0] == pytest.approx(losses, abs=1e-5)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(captured[1][name], value, rtol=0, atol=1e-4)


def test_the_page_has_both_tables():
    assert len(OPTIMIZERS) == 13
    assert {name for name, _ in SCHEDULES} == set(MADE)
