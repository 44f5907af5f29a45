"""CheckpointManager: saves, marks, and deletes what is no longer to be kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from tpuspec.checkpoint.background import BackgroundSave
from tpuspec.checkpoint.joint import JointSave
from tpuspec.checkpoint.policy import RetentionPolicy, SavePolicy
from tpuspec.checkpoint.state import TrainingState
from tpuspec.checkpoint.store import CheckpointStore
from tpuspec.errors import CheckpointError
from tpuspec.files.disk import InUseError
from tpuspec.files.location import Location


class CheckpointManager:
    """The one writer of a run's checkpoints: a store with the policies of when to save and what to keep.

    Args:
      store: where; prepared.
      save_policy: when; the caller asks it, `save` marks it.
      retention: which stay.
      background: writes while training goes on; None writes at once.
      join: makes the save of all processes, each of which has a manager then; None where this one saves alone.
    """

    def __init__(self, store: CheckpointStore, save_policy: SavePolicy, retention: RetentionPolicy,
                 background: BackgroundSave | None = None, join: Callable[[], JointSave] | None = None) -> None:
        self.store = store
        self.save_policy = save_policy
        self.retention = retention
        self._background, self._join = background, join
        self._is_closed = False

    def save(self, state: TrainingState, *, wait: bool = True) -> Location:
        """Commits a checkpoint, marks its step as saved, then deletes what retention no longer keeps.

        Args:
          state: in memory of its own, for it is written while training goes on.
          wait: whether to return when it is committed; else errors are raised by `check`, `wait` or the next save.

        Returns:
          The folder of the checkpoint.

        Raises:
          CheckpointError: it could not be written (then nothing is deleted), an old one not be deleted, or the manager
            is closed.
          HangError: the save before does not end.
        """
        if self._is_closed:
            raise CheckpointError("The checkpoint manager is closed; save before close().")
        joint = None if self._join is None else self._join()
        if self._background is None:
            self._write(state, joint)
        else:
            self._background.start(state.global_step, lambda: self._write(state, joint))
            if wait:
                self._background.wait()
        self.save_policy.saved(state.global_step)
        return self.store.path(state.global_step)

    def _write(self, state: TrainingState, joint: JointSave | None) -> None:
        self.store.save(state, joint)
        if joint is None or joint.leads:
            self._retain(state.global_step)

    def check(self) -> None:
        """Raises the error of a save under way, without waiting for it."""
        if self._background is not None:
            self._background.check()

    def wait(self) -> None:
        """Returns when every save is committed, and raises the error of one that failed."""
        if self._background is not None:
            self._background.wait()

    def _retain(self, saved_step: int) -> None:
        manifests = self.store.manifests()
        # A run that went back to an earlier step keeps what it has just saved; NaN does not displace the last good one.
        kept = {saved_step, *[manifest.global_step for manifest in manifests if manifest.is_finite][-1:]}
        if not manifests:
            return
        checkpoints = [(manifest.global_step, manifest.saved_at_seconds) for manifest in manifests]
        for step in self.retention.steps_to_delete(checkpoints, manifests[-1].started_at_seconds):
            if step not in kept:
                with contextlib.suppress(InUseError):  # its turn comes after a later save
                    self.store.delete(step)

    def close(self) -> None:
        """As `wait`; saves nothing more."""
        self._is_closed = True
        self.wait()
