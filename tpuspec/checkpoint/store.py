"""CheckpointStore: the checkpoints of one model_dir, each a folder checkpoint-<step>."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tpuspec.checkpoint.commit import commit, discard, sweep
from tpuspec.checkpoint.format import (
    MODEL_FILE,
    OPTIMIZER_FILE,
    is_complete,
    read_tensors,
    read_values,
    write_files,
)
from tpuspec.checkpoint.state import TrainingState, pack, storable_tensors, unpack
from tpuspec.errors import CheckpointError, ConfigError

_FOLDER = re.compile(r"checkpoint-(0|[1-9][0-9]{0,18})", re.ASCII)


class CheckpointStore:
    """Writes, lists, reads and deletes the checkpoints of a model_dir; one process writes, any may read.

    Args:
      model_dir: its folder; `prepare` makes it. It may be moved between runs.
      clock: seconds since the epoch, noted in each checkpoint.
    """

    def __init__(self, model_dir: str | os.PathLike[str], *, clock: Callable[[], float] = time.time) -> None:
        self.model_dir = Path(model_dir)
        self._clock = clock

    def prepare(self) -> None:
        """Makes the folder, proves that it can be written, and mends what a killed writer left in it.

        Raises:
          ConfigError: model_dir is no folder, or cannot be written.
        """
        self.check_writable()
        try:
            sweep(self.model_dir, is_complete)
        except OSError as error:
            raise self._not_writable(error) from error

    def check_writable(self) -> None:
        """Makes the folder and proves that it can be written.

        Raises:
          ConfigError: model_dir is no folder, or cannot be written.
        """
        probe = self.model_dir / f".probe-{os.getpid()}"
        try:
            self.model_dir.mkdir(parents=True, exist_ok=True)
            # Permission bits say nothing to root, or of a read-only mount; a write does.
            probe.write_bytes(b"tpuspec")
            probe.unlink()
        except (OSError, ValueError) as error:
            raise self._not_writable(error) from error

    def _not_writable(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"model_dir must be a folder that can be written; {str(self.model_dir)!r} is not: {error}. Mend its "
            "permissions, or set another model_dir.")

    def path(self, step: int) -> Path:
        """Returns the folder of the checkpoint of `step`, whether it exists or not."""
        return self.model_dir / f"checkpoint-{step}"

    def steps(self) -> list[int]:
        """Returns the steps of the committed checkpoints in ascending order; other folders are passed over.

        Raises:
          CheckpointError: model_dir exists and cannot be read.
        """
        try:
            steps = (int(match[1]) for match in map(_FOLDER.fullmatch, os.listdir(self.model_dir)) if match)
            return sorted(step for step in steps if is_complete(self.path(step)))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise CheckpointError(f"model_dir {self.model_dir} cannot be read: {error}.") from error

    def latest(self) -> Path | None:
        """Returns the committed checkpoint of the highest step, or None."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def save(self, state: TrainingState) -> Path:
        """Commits a checkpoint; one of the same step is replaced. All of `state` was read when it returns.

        Returns:
          The folder of the checkpoint.

        Raises:
          CheckpointError: `state` cannot be stored, or the folder not be written; what was there is untouched.
        """
        target = self.path(state.global_step)
        model = storable_tensors(state.model, "model")
        optimizers, optimizer_tensors = pack(state.optimizers, "optimizers")
        extra, extra_tensors = pack(state.extra, "extra")
        if extra_tensors:
            raise CheckpointError("TrainingState.extra holds values for JSON only; got tensors at "
                                  f"{', '.join(extra_tensors)}. Turn them into lists.")
        now = self._clock()
        started = self.started_at_seconds()
        values = {
            "global_step": state.global_step,
            "saved_at_seconds": now,
            "started_at_seconds": now if started is None else started,
            "optimizers": optimizers,
            "extra": extra,
        }
        try:
            commit(target, lambda folder: write_files(folder, values, model, optimizer_tensors))
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(
                f"The checkpoint of step {state.global_step} could not be written to {str(target)!r}; the earlier ones "
                f"are untouched. {type(error).__name__}: {error}") from error
        return target

    def read_step(self, path: str | os.PathLike[str]) -> int:
        """Returns the global step of a checkpoint.

        Raises:
          CheckpointError: `path` is no checkpoint that can be read.
        """
        return read_values(Path(path))["global_step"]

    def load(self, path: str | os.PathLike[str], *, optimizers: bool = True) -> TrainingState:
        """Reads a checkpoint of this or of another folder.

        Args:
          path: folder of the checkpoint.
          optimizers: whether to read the optimizers' state; without it, their file is not opened.

        Raises:
          CheckpointError: `path` is no checkpoint that can be read.
        """
        folder = Path(path)
        values = read_values(folder)
        return TrainingState(
            global_step=values["global_step"],
            model=read_tensors(folder / MODEL_FILE),
            optimizers=unpack(values["optimizers"], read_tensors(folder / OPTIMIZER_FILE)) if optimizers else {},
            extra=unpack(values["extra"], {}))

    def delete(self, step: int) -> None:
        """Deletes the checkpoint of `step`.

        Raises:
          CheckpointError: there is none, or it cannot be deleted.
        """
        try:
            discard(self.path(step))
        except OSError as error:
            raise CheckpointError(f"The checkpoint of step {step} could not be deleted: {error}.") from error

    def saved_at_seconds(self) -> list[tuple[int, float]]:
        """Returns (step, time of its commit) of the committed checkpoints that can be read, in ascending order."""
        return [(step, values["saved_at_seconds"]) for step in self.steps() if (values := self._peek(step))]

    def started_at_seconds(self) -> float | None:
        """Returns the time of the first commit ever made here, though it may be deleted since; None without any."""
        found = (self._peek(step) for step in reversed(self.steps()))
        return next((values["started_at_seconds"] for values in found if values), None)

    def _peek(self, step: int) -> dict[str, Any] | None:
        # A damaged checkpoint must not stop the saving of a good one; who loads it gets the error.
        try:
            return read_values(self.path(step))
        except CheckpointError:
            return None
