"""A one-weight regression that the Trainer's tests share, and what they read of a run."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import tpuspec
from tpuspec import ModeKeys, TPUEstimatorSpec


def regression_rows(num_rows: int) -> TensorDataset:
    x = torch.linspace(-1, 1, num_rows).reshape(-1, 1)
    return TensorDataset(x, 3 * x + 1)


def regression_fn(features, labels, mode, params, model, optimizer, global_step):
    prediction = model(features)
    if mode == ModeKeys.PREDICT:
        return TPUEstimatorSpec(mode, predictions={"y": prediction, "x": features})
    losses = F.mse_loss(prediction, labels, reduction="none").squeeze(1)
    if mode == ModeKeys.EVAL:
        return TPUEstimatorSpec(mode, loss=losses, eval_metrics=(
            lambda labels, prediction: {"mean_error": (labels - prediction).abs().squeeze(1)}, [labels, prediction]))
    loss = losses.mean()
    host_call = params.get("host_call")
    train_op = tpuspec.CrossShardOptimizer(optimizer).minimize(loss, accumulate_steps=params.get("accumulate", 1))
    return TPUEstimatorSpec(mode, loss=loss, train_op=train_op,
                            host_call=host_call and (host_call, [global_step, loss.reshape(1)]))


def sgd(module, params):
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def make_trainer(model_dir, model_fn=regression_fn, *, batch_size=4, use_tpu=True, iterations_per_loop=2, params=None,
                 model=lambda params: nn.Linear(1, 1), optimizer=sgd, **config):
    config = {"seed": 3, "show_progress": False} | config
    eval_on_tpu = config.pop("eval_on_tpu", True)
    return tpuspec.Trainer(
        model_fn, model=model, optimizer=optimizer, model_dir=model_dir, params=params, use_tpu=use_tpu,
        train_batch_size=batch_size, eval_batch_size=batch_size, predict_batch_size=batch_size, eval_on_tpu=eval_on_tpu,
        config=tpuspec.RunConfig(tpu_config=tpuspec.TPUConfig(iterations_per_loop=iterations_per_loop), **config))


def rows_input(num_rows=16):
    return lambda params: regression_rows(num_rows)


def num_compiles() -> int:
    from tpuspec.engine.executable import num_compiles

    return num_compiles()


def scalars(folder: Path) -> dict[str, list[int]]:
    steps: dict[str, list[int]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        steps.setdefault(entry["name"], []).append(entry["step"])
    return steps


def batch_norm_net(params):
    return nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
