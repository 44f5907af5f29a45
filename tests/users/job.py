"""A small job as a new user writes it, and how its runs are compared."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from tpuspec import CrossShardOptimizer, ModeKeys, RunConfig, TPUConfig, TPUEstimatorSpec, Trainer

ROWS, BATCH, STEPS, LOOP = 28, 8, 12, 6


@dataclass(frozen=True, kw_only=True)
class Job:
    """One user's job.

    Attributes:
      name: what it is.
      model_fn, model, optimizer: the Trainer's arguments.
      rows: makes (features, labels) of ROWS rows from a generator.
      kind: 'replay' or 'traced'.
      params, hooks: more of the Trainer's and of train()'s arguments; `hooks` makes them.
      precise: how close the losses are, relative to plain PyTorch's.
    """

    name: str
    model_fn: Callable[..., Any]
    model: Callable[..., Any]
    rows: Callable[[torch.Generator], tuple[Any, Any]]
    optimizer: Callable[..., Any] = field(default=lambda model, params: torch.optim.Adam(model.parameters(), lr=1e-3))
    kind: str = "replay"
    params: Mapping[str, Any] = field(default_factory=dict)
    hooks: Callable[[], list[Any]] = list
    precise: float = 1e-5


class Rows(Dataset[Any]):
    """Rows of nested tensors."""

    def __init__(self, tensors: Any) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(pytree.tree_leaves(self.tensors)[0])

    def __getitem__(self, index: int) -> Any:
        return pytree.tree_map(lambda tensor: tensor[index], self.tensors)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run gave: losses of its steps, metrics of an evaluation, predictions, and how its steps ran."""

    losses: list[float]
    metrics: dict[str, Any]
    predictions: list[Any]
    kind: str


def run(job: Job, folder: Path, *, use_tpu: bool) -> Outcome:
    """Trains, evaluates and predicts."""
    losses: list[float] = []
    trainer = Trainer(
        _recorded(job.model_fn, losses), model=job.model, optimizer=job.optimizer, params=dict(job.params),
        use_tpu=use_tpu, train_batch_size=BATCH, eval_batch_size=BATCH, predict_batch_size=BATCH, model_dir=folder,
        config=RunConfig(seed=7, show_progress=False, save_checkpoints_secs=None, save_checkpoints_steps=None,
                         tpu_config=TPUConfig(iterations_per_loop=LOOP)))

    def input_fn(params, mode):
        features, labels = job.rows(torch.Generator().manual_seed(len(mode)))
        return Rows(features if mode == ModeKeys.PREDICT or labels is None else (features, labels))

    trainer.train(input_fn, max_steps=STEPS, hooks=job.hooks())
    kind = trainer._sessions[True].backend.step_kind if use_tpu else "host"
    return Outcome(losses=losses, kind=kind, metrics=trainer.evaluate(input_fn),
                   predictions=list(trainer.predict(input_fn)))


def _recorded(model_fn: Callable[..., Any], losses: list[float]) -> Callable[..., Any]:
    @functools.wraps(model_fn)
    def recording(**arguments: Any) -> Any:
        spec = model_fn(**arguments)
        if arguments["mode"] != ModeKeys.TRAIN:
            return spec
        return spec.replace(host_call=(lambda loss: losses.extend(loss.tolist()), [spec.loss.detach().reshape(1)]))

    return recording


def supervised(losses_of: Callable[..., Any], *, output: Callable[..., Any] = lambda out: out, **minimize: Any
               ) -> Callable[..., Any]:
    """A model_fn whose loss per row is losses_of(model's output, labels)."""
    def model_fn(features, labels, mode, params, model, optimizer):
        out = model(features)
        if mode == ModeKeys.PREDICT:
            return TPUEstimatorSpec(mode, predictions={"output": output(out)})
        losses = losses_of(out, labels)
        if mode == ModeKeys.EVAL:
            return TPUEstimatorSpec(mode, loss=losses)
        loss = losses.mean()
        return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss, **minimize))

    return model_fn


def classes(out: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy, a value a row."""
    return F.cross_entropy(out, labels, reduction="none")


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Normal draws, [ROWS, *shape]."""
    return torch.randn(ROWS, *shape, generator=generator)


def whole(generator: torch.Generator, limit: int, *shape: int) -> torch.Tensor:
    """Whole numbers below a limit, [ROWS, *shape]."""
    return torch.randint(0, limit, (ROWS, *shape), generator=generator)
