"""One row of the parity table: python backend_run.py BACKEND OUT trains and evaluates three recipes.

Without dropout, and with BatchNorm's statistics of its own (a GroupNorm in its place): both differ between replicas by
their nature. SGD in place of AdamW, which makes a step of full size out of a gradient that is zero but for rounding.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tpuspec
from tpuspec.recipes import digits, gpt_bytes, tabular

NUM_STEPS, BATCH_SIZE = 10, 24
SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "digits": (digits, {"width": 8, "dropout": 0.0}),
    "tabular": (tabular, {"width": 16, "dropout": 0.0}),
    "gpt_bytes": (gpt_bytes, {
        "folder": str(Path(__file__).parent.parent.parent / "tpuspec"), "length": 16, "width": 16, "num_layers": 2,
        "num_heads": 2, "dropout": 0.0, "clip_grad_norm": 1.0, "eval_windows": 50, "num_samples": 1})}

DEVICES: dict[str, dict[str, Any]] = {
    "xla1": {"num_shards": 1}, "xla4": {"num_shards": 4}, "spmd4": {"mesh": {"data": 2, "model": 2}, "fsdp": True}}


def without_batch_norm(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(1, child.num_features))
        else:
            without_batch_norm(child)
    return module


def run(backend: str, out: Path) -> dict[str, Any]:
    results = {}
    for name, (recipe, params) in SETTINGS.items():
        config = tpuspec.RunConfig(
            seed=5, show_progress=False, save_summary_steps=None, device="cuda" if backend == "cuda1" else None,
            tpu_config=tpuspec.TPUConfig(**DEVICES.get(backend, {})))
        trainer = tpuspec.Trainer(
            recipe.model_fn, model=lambda params, recipe=recipe: without_batch_norm(recipe.model(params)),
            optimizer=lambda model, params: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
            model_dir=out / f"{backend}-{name}-{os.environ.get('RANK', 0)}", config=config, params=params,
            use_tpu=backend in DEVICES, train_batch_size=BATCH_SIZE, eval_batch_size=BATCH_SIZE,
            predict_batch_size=BATCH_SIZE)
        trainer.train(recipe.input_fn, max_steps=NUM_STEPS)
        metrics = trainer.evaluate(recipe.input_fn)
        session = next(iter(trainer._sessions.values()))
        weights = [number for tensor in session.model_state().values() for number in tensor.double().flatten().tolist()]
        results[name] = {"weights": weights, "metrics": {
            metric: torch.as_tensor(value).double().flatten().tolist() for metric, value in metrics.items()}}
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    backend, out = sys.argv[1], Path(sys.argv[2])
    (out / f"{backend}-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(run(backend, out)))
