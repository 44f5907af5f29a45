"""CheckpointManager: saves, marks, and deletes what is no longer to be kept."""

from __future__ import annotations

import contextlib
from pathlib import Path

from tpuspec.checkpoint.commit import InUseError
from tpuspec.checkpoint.policy import RetentionPolicy, SavePolicy
from tpuspec.checkpoint.state import TrainingState
from tpuspec.checkpoint.store import CheckpointStore
from tpuspec.errors import CheckpointError


class CheckpointManager:
    """The one writer of a run's checkpoints: a store with the policies of when to save and what to keep.

    Args:
      store: where; prepared.
      save_policy: when; the caller asks it, `save` marks it.
      retention: which stay.
    """

    def __init__(self, store: CheckpointStore, save_policy: SavePolicy, retention: RetentionPolicy) -> None:
        self.store = store
        self.save_policy = save_policy
        self.retention = retention
        self._is_closed = False

    def save(self, state: TrainingState) -> Path:
        """Commits a checkpoint, marks its step as saved, then deletes what retention no longer keeps.

        Returns:
          The folder of the checkpoint.

        Raises:
          CheckpointError: it could not be written (then nothing is deleted), an old one not be deleted, or the manager
            is closed.
        """
        if self._is_closed:
            raise CheckpointError("The checkpoint manager is closed; save before close().")
        path = self.store.save(state)
        self.save_policy.saved(state.global_step)
        self._retain(state.global_step)
        return path

    def _retain(self, saved_step: int) -> None:
        manifests = self.store.manifests()
        # A run that went back to an earlier step keeps what it has just saved; NaN does not displace the last good one.
        kept = {saved_step, *[manifest.global_step for manifest in manifests if manifest.is_finite][-1:]}
        started = self.store.started_at_seconds()
        if started is None:
            return
        checkpoints = [(manifest.global_step, manifest.saved_at_seconds) for manifest in manifests]
        for step in self.retention.steps_to_delete(checkpoints, started):
            if step not in kept:
                with contextlib.suppress(InUseError):  # its turn comes after a later save
                    self.store.delete(step)

    def close(self) -> None:
        """Returns when every save is committed, and raises the error of one that failed; saves nothing more."""
        self._is_closed = True
