"""A command line that runs in this process, with a Trainer that only remembers what it was asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tpuspec
from tpuspec import train
from tpuspec.export.bundle import METADATA_FILE, Metadata
from tpuspec.export.signature import Signature, TensorSpec

NUM_PREDICTIONS = 5


@dataclass
class Calls:
    """What the fake Trainers of one test were asked, and what they answer."""

    made: list[dict[str, Any]] = field(default_factory=list)
    done: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    global_step: int = 0
    error: BaseException | None = None
    fails_at_job: int = 0


class FakeTrainer:
    """The Trainer's interface without a model."""

    is_chief = True

    def __init__(self, calls: Calls, model_fn: Any, **arguments: Any) -> None:
        calls.made.append({"model_fn": model_fn, **arguments})
        self._calls, self.config = calls, arguments["config"]
        self.model_dir = arguments["model_dir"]

    def global_step(self) -> int:
        return self._calls.global_step

    def latest_checkpoint(self) -> str | None:
        return f"{self.model_dir}/step" if self._calls.global_step else None

    def train(self, input_fn: Any, **arguments: Any) -> None:
        self._do("train", arguments)
        self._calls.global_step = arguments["max_steps"] or arguments["steps"]

    def evaluate(self, input_fn: Any, **arguments: Any) -> dict[str, Any]:
        self._do("evaluate", arguments)
        return {"accuracy": 0.75, "recall": np.array([0.5, 1.0]), "loss": 0.25, "global_step": self._calls.global_step}

    def predict(self, input_fn: Any) -> Iterator[dict[str, Any]]:
        self._do("predict", {})
        for row in range(NUM_PREDICTIONS):
            yield {"classes": np.int64(row), "scores": np.array([0.5, row], dtype=np.float32)}

    def export(self, export_dir_base: str, serving_input_fn: Any, checkpoint_path: str | None) -> str:
        self._do("export", {"base": export_dir_base, "checkpoint_path": checkpoint_path})
        folder = Path(export_dir_base) / "1700000000"
        folder.mkdir(parents=True)
        image, label = TensorSpec(torch.float32, ("batch", 8, 8)), TensorSpec(torch.int64, ("batch",))
        (folder / METADATA_FILE).write_bytes(Metadata(
            global_step=5, metrics={}, inputs={"image": image}, single_input=False, programs={}, files={},
            signatures={"serving_default": Signature(kind="predict", outputs={"classes": label})},
            torch_version="2.9.0").encode())
        return str(folder)

    def _do(self, name: str, arguments: dict[str, Any]) -> None:
        self._calls.done.append((name, arguments))
        if self._calls.error is not None and len(self._calls.made) == self._calls.fails_at_job + 1:
            raise self._calls.error


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found = Calls()
    monkeypatch.setattr(tpuspec, "Trainer", lambda model_fn, **arguments: FakeTrainer(found, model_fn, **arguments))
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    path = tmp_path / "work"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


@pytest.fixture
def command(calls: Calls, folder: Path) -> Callable[..., int]:
    """Runs the command line in the empty folder, with the fake Trainer; returns the exit code."""
    return lambda *arguments: train.main(arguments)


@pytest.fixture
def user_config(tmp_path: Path) -> Callable[..., Path]:
    """Writes config/NAME.yaml of the user's own and returns the folder for --config-dir."""
    def write(text: str, name: str = "mine", header: str = "# @package _global_\n") -> Path:
        path = tmp_path / "user configs" / "config" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(header + text, encoding="utf-8")
        return path.parent.parent

    return write
