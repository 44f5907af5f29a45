"""A user's code over the public API, which `make types` holds against pyright's strict rules; nothing runs it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import tpuspec
from tpuspec import InputFn, ModeKeys, ModelFn, TPUEstimatorSpec


def metric_fn(labels: Tensor, logits: Tensor) -> Mapping[str, Any]:
    return {"accuracy": logits.argmax(1) == labels}


def host_call(step: Tensor, loss: Tensor) -> None:
    tpuspec.summary.scalar("my_loss", loss[0])


def model_fn(features: Tensor, labels: Tensor, mode: ModeKeys, model: nn.Module,
             optimizer: torch.optim.Optimizer, global_step: Tensor) -> TPUEstimatorSpec:
    logits: Tensor = model(features)
    if mode == ModeKeys.PREDICT:
        return TPUEstimatorSpec(mode, predictions={"class": logits.argmax(1)})
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    if mode == ModeKeys.EVAL:
        return TPUEstimatorSpec(mode, loss=losses, eval_metrics=(metric_fn, [labels, logits]))
    loss = losses.mean()
    return TPUEstimatorSpec(mode, loss=loss, train_op=tpuspec.CrossShardOptimizer(optimizer).minimize(loss),
                            host_call=(host_call, [global_step, loss.reshape(1)]))


def input_fn(params: Mapping[str, Any]) -> TensorDataset:
    return TensorDataset(torch.randn(100, 8), torch.zeros(100, dtype=torch.long))


def build(params: Mapping[str, Any]) -> nn.Module:
    return nn.Linear(8, 2)


def make_optimizer(model: nn.Module | None, params: Mapping[str, Any]) -> torch.optim.Optimizer:
    assert model is not None
    return torch.optim.AdamW(model.parameters(), lr=0.01)


class Tell(tpuspec.SessionRunHook):
    def after_run(self, context: tpuspec.HookContext) -> None:
        print(context.step)


def main() -> None:
    of_model: ModelFn = model_fn
    of_input: InputFn = input_fn
    trainer = tpuspec.Trainer(of_model, model=build, optimizer=make_optimizer, train_batch_size=64, eval_batch_size=64,
                              predict_batch_size=64, config=tpuspec.RunConfig(seed=1))
    trainer.train(of_input, max_steps=20, hooks=[Tell()])
    metrics = trainer.evaluate(of_input)
    print(metrics["loss"])
    for row in trainer.predict(of_input):
        print(row["class"])
    tpuspec.train_and_evaluate(trainer, tpuspec.TrainSpec(of_input, max_steps=40), tpuspec.EvalSpec(of_input))
