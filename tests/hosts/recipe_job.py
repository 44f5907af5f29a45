"""What each process of the matrix runs: a recipe, small, on one layout; notes of it go to out/result<host>.json."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

import tpuspec
from tpuspec import ModeKeys
from tpuspec.recipes import digits, gpt_bytes, tabular

ROWS, STEPS, SAVED = 101, 20, 10


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe of tpuspec/recipes/, and what is changed of it: no dropout, whose draws are each layout's own."""

    module: Any
    params: dict[str, Any]
    sharding: dict[str, Any]
    predictions: str | None = None
    batch: int = 32


RECIPES = {
    "digits": Recipe(digits, {"width": 8, "dropout": 0.0}, {
        "4.weight": ["model", None, None, None], "4.bias": ["model"], "9.weight": [None, "model"]}, "probabilities"),
    "tabular": Recipe(tabular, {"width": 32, "dropout": 0.0}, {
        "0.weight": ["model", None], "0.bias": ["model"], "3.weight": [None, "model"]}, "malignant"),
    "gpt_bytes": Recipe(gpt_bytes, {
        "length": 16, "width": 32, "num_layers": 2, "num_heads": 2, "dropout": 0.0, "clip_grad_norm": 1.0,
        "folder": str(Path(tpuspec.__file__).parent), "num_samples": 32, "sample_bytes": 2, "temperature": 0.8,
        "eval_windows": ROWS},
        {"*.mlp.0.weight": ["model", None], "*.mlp.0.bias": ["model"], "*.mlp.2.weight": [None, "model"]}, batch=16),
}


def optimizer(model: Any, params: Any) -> torch.optim.Optimizer:
    """The recipes' AdamW; where a gradient is 0 but for rounding, its sign would be the update without a larger eps."""
    return torch.optim.AdamW(model.parameters(), lr=0.002, weight_decay=0.01, eps=1e-3)


def tpu_settings(recipe: str, layout: str, num_devices: int) -> dict[str, Any]:
    """Returns fields of TPUConfig for all devices of all processes."""
    if layout == "replicas":
        return {"num_shards": num_devices}
    if layout == "data x model":
        return {"mesh": {"data": num_devices // 2, "model": 2}, "sharding": RECIPES[recipe].sharding}
    return {"mesh": {"data": num_devices}, "fsdp": layout == "fsdp"}


def run(job: str, out: Path, *, recipe: str, tpu: str, begin: str = "", folder: str = "", **_: str) -> None:
    """Trains, evaluates, predicts ('whole'); goes on from its own step 10 ('resume') or another's ('other')."""
    host = int(os.environ.get("RANK", "0"))
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    base = Path(folder or out)
    for part in job.split(","):
        model_dir = base / part
        if part != "whole" and host == 0:  # the others see it once the chief tells them of it
            source = base / "whole" if part == "resume" else Path(begin)
            shutil.copytree(source / f"checkpoint-{SAVED}", model_dir / f"checkpoint-{SAVED}")
        result[part] = _train(part, RECIPES[recipe], model_dir, json.loads(tpu))
    (out / f"result{host}.json").write_text(json.dumps(result))


def _train(part: str, recipe: Recipe, model_dir: Path, tpu: dict[str, Any]) -> dict[str, Any]:
    losses: list[float] = []

    def input_fn(params: Any, mode: str) -> Any:
        dataset = recipe.module.input_fn(params, mode)
        return Subset(dataset, range(ROWS)) if mode != ModeKeys.TRAIN and hasattr(dataset, "__len__") else dataset

    takes_step = "global_step" in inspect.signature(recipe.module.model_fn).parameters

    def model_fn(features: Any, labels: Any, mode: str, params: Any, model: Any, optimizer: Any,
                 global_step: Any) -> Any:
        step = {"global_step": global_step} if takes_step else {}
        spec = recipe.module.model_fn(features, labels, mode, params, model, optimizer, **step)
        return spec if mode != ModeKeys.TRAIN else dataclasses.replace(
            spec, host_call=(lambda loss: losses.append(loss.double().mean().item()), [spec.loss.reshape(1)]))

    trainer = tpuspec.Trainer(
        model_fn, model=recipe.module.model, optimizer=optimizer, params=recipe.params, model_dir=model_dir,
        config=tpuspec.RunConfig(seed=3, show_progress=False, save_checkpoints_steps=SAVED,
                                 tpu_config=tpuspec.TPUConfig(iterations_per_loop=5, **tpu)),
        train_batch_size=recipe.batch, eval_batch_size=recipe.batch, predict_batch_size=recipe.batch)
    trainer.train(input_fn, max_steps=STEPS)
    result: dict[str, Any] = {"losses": losses, "step": trainer.global_step()}
    if part == "whole":
        result["metrics"] = {key: float(np.mean(value)) for key, value in trainer.evaluate(input_fn).items()}
        if recipe.predictions is not None:
            result["predictions"] = [np.asarray(row[recipe.predictions]).tolist() for row in trainer.predict(input_fn)]
    state = trainer._sessions[True].model_state()
    result["weights"] = {name: value.flatten().tolist() for name, value in state.items()}
    return result
