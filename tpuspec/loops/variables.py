"""What the newest checkpoint of a model_dir holds, by name."""

from __future__ import annotations

from typing import Any

import numpy as np

from tpuspec.checkpoint.store import CheckpointStore
from tpuspec.checkpoint.stored import StoredTensor
from tpuspec.errors import ConfigError
from tpuspec.loops.predict import to_numpy


class ReadsVariables:
    """A Trainer's look into its checkpoints; the attribute `_store` is theirs."""

    _store: CheckpointStore

    def latest_checkpoint(self) -> str | None:
        """Path of the newest checkpoint in model_dir, or None."""
        path = self._store.latest()
        return None if path is None else str(path)

    def get_variable_names(self) -> list[str]:
        """Names of what the newest checkpoint holds of the model, and 'global_step'.

        Raises:
          ConfigError: there is no checkpoint.
        """
        return sorted([*self._load_model(self._newest_checkpoint()), "global_step"])

    def get_variable_value(self, name: str) -> np.ndarray[Any, Any]:
        """Value of one name in the newest checkpoint.

        Raises:
          ConfigError: there is no checkpoint, or no such name in it.
        """
        path = self._newest_checkpoint()
        if name == "global_step":
            return np.asarray(self._store.read_step(path))
        values = self._load_model(path)
        if name not in values:
            raise ConfigError(f"no variable {name!r} in {path}; it holds {sorted(values)}.")
        return to_numpy(values[name].read() if isinstance(values[name], StoredTensor) else values[name])

    def _newest_checkpoint(self) -> str:
        path = self.latest_checkpoint()
        if path is None:
            raise ConfigError(f"Could not find trained model in model_dir: {self._store.model_dir}.")
        return path

    def _load_model(self, path: str) -> dict[str, Any]:
        self._store.verify(path)
        return self._store.load_stored(path, optimizers=False).model
