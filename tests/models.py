"""The smallest model_fn, input, Trainer and hook, for tests that drive a Trainer."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tpuspec import (
    CrossShardOptimizer,
    HookContext,
    ModeKeys,
    RunConfig,
    ServingInputReceiver,
    SessionRunHook,
    TPUEstimatorSpec,
    Trainer,
)

BATCH_SIZE = 2


def make_model(params: Mapping[str, Any]) -> nn.Module:
    return nn.Linear(1, 1)


def make_optimizer(model: nn.Module, params: Mapping[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def make_spec(mode: str, outputs: Tensor, labels: Tensor | None, optimizer: Any, **fields: Any) -> TPUEstimatorSpec:
    """The spec of a regression; `fields` are added to it or replace its own."""
    if mode == ModeKeys.PREDICT:
        return TPUEstimatorSpec(mode, **{"predictions": {"outputs": outputs}, **fields})
    loss = (outputs if labels is None else outputs - labels).square().mean()
    if mode == ModeKeys.TRAIN:
        fields = {"train_op": CrossShardOptimizer(optimizer).minimize(loss), **fields}
    return TPUEstimatorSpec(mode, **{"loss": loss, **fields})


def model_fn(features, labels, mode, params, model, optimizer):
    return make_spec(mode, model(features), labels, optimizer)


def in_predict(function: Callable[..., TPUEstimatorSpec]) -> Callable[..., TPUEstimatorSpec]:
    """The regression's model_fn, but for mode PREDICT, where it is a function of (features, mode, params, model)."""
    def both(features, labels, mode, params, model, optimizer):
        if mode == ModeKeys.PREDICT:
            return function(features, mode, params, model)
        return model_fn(features, labels, mode, params, model, optimizer)

    return both


def serving_input_fn():
    return ServingInputReceiver(torch.zeros(1, 1))


def input_fn(params):
    """Two batches of ones with labels of zeros; repeated without end in TRAIN."""
    return TensorDataset(torch.ones(2 * BATCH_SIZE, 1), torch.zeros(2 * BATCH_SIZE, 1))


def make_config(**changes: Any) -> RunConfig:
    return RunConfig(**{"seed": 1, "show_progress": False, **changes})


def make_trainer(model_dir: str | os.PathLike[str] | None, model_fn: Callable[..., Any] = model_fn,
                 **arguments: Any) -> Trainer:
    """A Trainer of the tiny model; `arguments` are added to its own or replace them."""
    return Trainer(model_fn, model_dir=model_dir, **{
        "model": make_model, "optimizer": make_optimizer, "config": make_config(), "params": {},
        "train_batch_size": BATCH_SIZE, "eval_batch_size": BATCH_SIZE, "predict_batch_size": BATCH_SIZE, **arguments})


VERBS = ("train", "evaluate", "predict")


def run(trainer: Trainer, verb: str, input_fn: Callable[..., Any] = input_fn, *,
        hooks: list[SessionRunHook] | None = None) -> Any:
    """Trains one step, evaluates, or predicts, to the end."""
    if verb == "train":
        return trainer.train(input_fn, steps=1, hooks=hooks)
    if verb == "evaluate":
        return trainer.evaluate(input_fn, hooks=hooks)
    return list(trainer.predict(input_fn, hooks=hooks))


class StepRecorder(SessionRunHook):
    """Notes the step each time the host has control."""

    def __init__(self) -> None:
        self.before: list[int] = []
        self.after: list[int] = []

    def before_run(self, context: HookContext) -> None:
        self.before.append(context.step)

    def after_run(self, context: HookContext) -> None:
        self.after.append(context.step)
