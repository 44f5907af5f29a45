"""The tables of docs/capture.md: which optimizers and schedules are replayed, each with the bits of the traced run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from tests.runtime.test_capture import assert_same, batches, classify, kind, rows, run, sgd

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


def test_the_page_has_both_tables():
    assert len(OPTIMIZERS) == 13
    assert {name for name, _ in SCHEDULES} == set(MADE)
