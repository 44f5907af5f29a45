"""Small checkpoints whose parts all hold one number, and what tests change in them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from tpuspec.checkpoint.manifest import _seal
from tpuspec.checkpoint.state import TrainingState
from tpuspec.checkpoint.store import CheckpointStore


def state_of(step: int, value: float = 1.0) -> TrainingState:
    return TrainingState(global_step=step, model={"w": torch.full((3,), value)},
                         optimizers={"": {"state": {0: {"m": torch.full((3,), value)}}, "param_groups": []}})


def damaged_steps(store: CheckpointStore) -> list[int]:
    """The steps of the committed checkpoints whose bytes have changed."""
    whole = {manifest.global_step for manifest in store.manifests()}
    return [step for step in store.steps() if step not in whole]


def newest_value(model_dir: str | os.PathLike[str], **options: Any) -> float:
    """The value of the newest checkpoint, the same in all its parts; what dead writers left is mended before."""
    store = CheckpointStore(model_dir, **options)
    store.prepare()
    newest = store.latest()
    assert newest is not None
    state = store.load(newest)
    values = {*state.model["w"].tolist(), *state.optimizers[""]["state"][0]["m"].tolist()}
    assert len(values) == 1, "a mix"
    return values.pop()


def rewrite_manifest(checkpoint: Path, **changes: Any) -> Path:
    """Writes another manifest with a right checksum; returns its file."""
    file = checkpoint / "manifest.json"
    body = json.loads(file.read_text())
    del body["crc32"]
    file.write_bytes(_seal(body | changes))
    return file
