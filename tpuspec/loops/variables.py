"""What the newest weights are, by name: those in memory, or those of the newest checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tpuspec.checkpoint.store import CheckpointStore
from tpuspec.checkpoint.stored import StoredTensor
from tpuspec.errors import ConfigError
from tpuspec.loops.predict import to_numpy
from tpuspec.loops.session import Session


class ReadsVariables:
    """A Trainer's look at its newest weights; the attributes are the Trainer's."""

    _store: CheckpointStore
    _sessions: dict[bool, Session]
    _use_tpu: bool

    def latest_checkpoint(self) -> str | None:
        """Path of the newest checkpoint in model_dir, or None."""
        path = self._store.latest()
        return None if path is None else str(path)

    def get_variable_names(self) -> list[str]:
        """Names of the newest weights, and 'global_step'.

        The weights are those in memory, as after a train() that saved nothing, or the newest checkpoint's, whichever
        are further; with several hosts the checkpoint's.

        Raises:
          ConfigError: there is no checkpoint, and nothing was trained.
        """
        return sorted([*self._newest()[1], "global_step"])

    def get_variable_value(self, name: str) -> np.ndarray[Any, Any]:
        """Value of one of `get_variable_names`; of a checkpoint no other one is read.

        Raises:
          ConfigError: as `get_variable_names`, or there is no such name.
        """
        step, values, where = self._newest()
        if name == "global_step":
            return np.asarray(step)
        if name not in values:
            raise ConfigError(f"no variable {name!r} in {where}; it holds {sorted(values)}.")
        return to_numpy(values[name].read() if isinstance(values[name], StoredTensor) else values[name])

    def _newest(self) -> tuple[int, Mapping[str, Any], str]:
        """Returns the global step, the weights by name, and where they are."""
        path, session = self.latest_checkpoint(), self._sessions.get(self._use_tpu)
        saved = -1 if path is None else self._store.read_step(path)
        if session is not None and session.has_state and session.global_step > saved and (
                session.backend.coordinator.num_hosts == 1):
            return session.global_step, session.model_state(), "the model in memory"
        if path is None:
            raise ConfigError(f"Could not find trained model in model_dir: {self._store.model_dir}.")
        self._store.verify(path)
        return saved, self._store.load_stored(path, optimizers=False).model, path
