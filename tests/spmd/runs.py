"""What the tests of SPMD train, on a mesh or on one device: python runs.py train|resume FOLDER computes on one."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from tpuspec import CrossShardOptimizer, ModeKeys, RunConfig, TPUConfig, TPUEstimatorSpec, Trainer

BATCH, NUM_STEPS, NUM_EVAL_ROWS, NUM_CLASSES = 16, 30, 101, 8
RECORDS: list[dict[str, Any]] = []
SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"dropout": 0.3, "schedule": True, "minimize": {"clip_grad_norm": 0.3, "accumulate_steps": 2}},
    "adamw": {"adamw": True},
    "bf16": {"precision": "bf16", "adamw": True},
    "bf16-mixed": {"precision": "bf16-mixed", "minimize": {"clip_grad_norm": 0.3, "accumulate_steps": 2}},
}


def model_fn(features, labels, mode, params, model, optimizer, global_step):
    logits = model(features["x"])
    if mode == ModeKeys.PREDICT:
        return TPUEstimatorSpec(mode, predictions={"logits": logits, "row": features["row"]})
    losses = F.cross_entropy(logits, labels, reduction="none")
    if mode == ModeKeys.EVAL:
        return TPUEstimatorSpec(mode, loss=losses, eval_metrics=(
            lambda labels, logits: {"accuracy": logits.argmax(1) == labels}, [labels, logits]))
    loss = losses.mean()
    return TPUEstimatorSpec(
        mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss, **params.get("minimize", {})),
        host_call=(record, {"step": global_step, "loss": loss.reshape(1), "row": features["row"]}))


def record(step, loss, row):
    RECORDS.append({"step": step.tolist(), "loss": loss.mean().item(), "row": row.tolist()})


def net(params):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(params.get("dropout", 0.0)),
                         nn.Linear(16, NUM_CLASSES))


def optimizer(model, params):
    if params.get("adamw"):
        return torch.optim.AdamW(model.parameters(), lr=0.01)
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def scheduler(optimizer, params):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_STEPS)


def rows(num_rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, 8, generator=generator)
    return {"x": x, "row": torch.arange(num_rows)}, (x[:, :4].argmax(1) + 4 * (x[:, 4] > 0)).long()


def input_fn(params, mode):
    if mode != ModeKeys.TRAIN:
        return TensorRows(*rows(NUM_EVAL_ROWS, seed=1))
    features, labels = rows(5 * BATCH)
    size = params["batch_size"]
    batches = [({name: value[i:i + size] for name, value in features.items()}, labels[i:i + size])
               for i in range(0, len(labels), size)]
    return list(itertools.islice(itertools.cycle(batches), 3 * NUM_STEPS * BATCH // size))


class TensorRows(TensorDataset):
    """A Dataset of ({x, row}, label)."""

    def __init__(self, features, labels):
        super().__init__(features["x"], features["row"], labels)

    def __getitem__(self, index):
        x, row, label = super().__getitem__(index)
        return {"x": x, "row": row}, label


def make(scenario, folder, *, capture="require", model=net, fn=model_fn, loop=10, **tpu):
    params = SCENARIOS[scenario]
    return Trainer(
        fn, model=model, optimizer=optimizer, scheduler=scheduler if params.get("schedule") else None, params=params,
        train_batch_size=BATCH, eval_batch_size=BATCH, predict_batch_size=BATCH, model_dir=folder,
        config=RunConfig(seed=3, show_progress=False, capture=capture, audit_every_steps=15,
                         precision=params.get("precision"), save_checkpoints_steps=1000,
                         tpu_config=TPUConfig(iterations_per_loop=loop, **tpu)))


def weights(trainer):
    return trainer._sessions[True].model_state()


def results(trainer, num_steps=NUM_STEPS):
    """Trains to a step; returns the records of host_call, weights, metrics and predictions."""
    RECORDS.clear()
    trainer.train(input_fn, max_steps=num_steps)
    predicted = list(trainer.predict(input_fn))
    return {"records": [dict(item) for item in RECORDS],
            "weights": {name: value.tolist() for name, value in weights(trainer).items()},
            "metrics": trainer.evaluate(input_fn),
            "logits": np.stack([row["logits"] for row in predicted]).tolist(),
            "rows": [int(row["row"]) for row in predicted]}


if __name__ == "__main__":
    verb, folder = sys.argv[1], Path(sys.argv[2])
    if verb == "train":
        found = {name: results(make(name, folder / name)) for name in SCENARIOS}
    else:  # goes on from another run's checkpoint
        found = results(make("all", folder), 2 * NUM_STEPS)
    (folder / "results.json").write_text(json.dumps(found))
