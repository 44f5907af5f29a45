"""A small training in one precision, for tests on one replica, on several, and without XLA."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from tpuspec import CrossShardOptimizer, ModeKeys, RunConfig, TPUConfig, TPUEstimatorSpec, Trainer

BATCH, NUM_STEPS = 8, 6
HLO_NAMES = {"float32": "f32", "bfloat16": "bf16"}


def documented(precision: str) -> dict[str, set[str]]:
    """Reads a precision's column of the table of docs/precision.md, in HLO's names."""
    text = (Path(__file__).parent.parent / "docs/precision.md").read_text()
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    column = rows[0].index(precision)
    return {row[0]: {HLO_NAMES[row[column]]} for row in rows[2:] if len(row) == len(rows[0])}


class Recorder:
    """A model_fn that keeps the losses that its host_call gets, and the dtypes that reach its host functions."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.host_dtypes: set[torch.dtype] = set()

    def model_fn(self, features, labels, mode, params, model, optimizer):
        logits = model(features)
        if mode == ModeKeys.PREDICT:
            return TPUEstimatorSpec(mode, predictions={"logits": logits})
        losses = F.cross_entropy(logits, labels, reduction="none")
        if mode == ModeKeys.EVAL:
            return TPUEstimatorSpec(mode, loss=losses, eval_metrics=(self.metric_fn, [labels, logits]))
        loss = losses.mean()
        return TPUEstimatorSpec(
            mode, loss=loss, host_call=(self.host_call, [loss.reshape(1), logits]),
            train_op=CrossShardOptimizer(optimizer).minimize(loss, clip_grad_norm=1.0, accumulate_steps=2))

    def metric_fn(self, labels, logits):
        self.host_dtypes.add(logits.dtype)
        return {"accuracy": torch.from_numpy(logits.numpy().argmax(1) == labels.numpy())}

    def host_call(self, loss, logits):
        self.host_dtypes |= {loss.dtype, logits.dtype}
        self.losses += loss.numpy().tolist()


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16, affine=False), nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.1),
                         nn.Linear(16, 10))


def input_fn(params, mode):
    """Batches of float64, numpy's default, which a precision casts."""
    generator = torch.Generator().manual_seed(0)

    def batch():
        return (torch.randn(params["batch_size"], 1, 4, 4, generator=generator, dtype=torch.float64),
                torch.randint(0, 10, (params["batch_size"],), generator=generator))

    drawn = [batch() for _ in range(3)]
    return drawn * 10 if mode == ModeKeys.TRAIN else drawn


def make_trainer(recorder: Recorder, model_dir, precision, *, capture="auto", num_shards=None, model=None, **arguments):
    return Trainer(
        recorder.model_fn, model=copy.deepcopy(model or make_model()), params={},
        optimizer=lambda model, params: torch.optim.AdamW(model.parameters(), lr=1e-2), model_dir=model_dir,
        train_batch_size=BATCH, eval_batch_size=BATCH, predict_batch_size=BATCH, **arguments, config=RunConfig(
            seed=1, precision=precision, capture=capture, show_progress=False, audit_every_steps=3,
            tpu_config=TPUConfig(iterations_per_loop=4, num_shards=num_shards)))


def weights(trainer):
    (session,) = trainer._sessions.values()
    return session.model_state()
