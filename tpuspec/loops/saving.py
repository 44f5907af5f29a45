"""Checkpoints of a training run: at the start, at their distance, and at the end, with listeners around each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from tpuspec.checkpoint.background import BackgroundSave
from tpuspec.checkpoint.joint import JointSave
from tpuspec.checkpoint.manager import CheckpointManager
from tpuspec.checkpoint.policy import RetentionPolicy, SavePolicy
from tpuspec.checkpoint.state import TrainingState
from tpuspec.checkpoint.store import CheckpointStore
from tpuspec.config import RunConfig
from tpuspec.errors import TpuspecError
from tpuspec.loops.agreement import AgreedSavePolicy, NoSave
from tpuspec.loops.chief_store import ChiefStore
from tpuspec.loops.hooks import ListenerRunner
from tpuspec.loops.session import Session
from tpuspec.loops.split_state import may_be_in_pieces
from tpuspec.spec.coordinator import Coordinator
from tpuspec.spec.hooks import CheckpointSaverListener
from tpuspec.spec.phase import in_phase
from tpuspec.spec.scaffold import Scaffold

logger = logging.getLogger(__name__)


def make_policy(config: RunConfig, coordinator: Coordinator) -> SavePolicy:
    """Returns when to save; the same on every host."""
    steps, seconds = config.save_checkpoints_steps, config.save_checkpoints_secs
    assert not isinstance(steps, str) and not isinstance(seconds, str), "resolved by RunConfig"
    return AgreedSavePolicy(coordinator, steps, seconds)


def saves_in_pieces(session: Session, store: CheckpointStore, scaffold: Scaffold) -> bool:
    """Whether each host writes its pieces of a checkpoint; all of them ask.

    Args:
      session: has the state.
      store: as all hosts use it together.
      scaffold: may read the module itself, which makes it whole on every host.
    """
    if not may_be_in_pieces(session.backend, session.replicas[0], scaffold) or not isinstance(store, ChiefStore):
        return False
    if store.is_shared():
        return True
    if session.backend.coordinator.is_chief:
        logger.warning("the hosts do not all see the chief's model_dir %s, or may not write there: the chief writes "
                       "whole checkpoints. Weights that are larger than its memory need a folder that all share.",
                       store.model_dir)
    return False


def make_manager(config: RunConfig, store: CheckpointStore, policy: SavePolicy, coordinator: Coordinator, *,
                 jointly: bool = False) -> CheckpointManager | NoSave:
    """Returns what saves on this host; on hosts that are not the chief it saves nothing, unless they save `jointly`."""
    if not coordinator.is_chief and not jointly:
        return NoSave(policy)
    retention = RetentionPolicy(max_to_keep=config.keep_checkpoint_max,
                                keep_every_n_hours=config.keep_checkpoint_every_n_hours)
    background = BackgroundSave(config.checkpoint_timeout_secs) if config.async_checkpoints else None
    return CheckpointManager(store, policy, retention, background,
                             join=(lambda: JointSave(coordinator)) if jointly else None)


class Saver:
    """Saves when its policy says so; see `CheckpointManager` for what a save does.

    Args:
      manager: store, policies and retention.
      policy: when to save; the manager's.
      read_state: reads the newest state, published before.
      listeners: called around each save.
      reads_tensors: whether `read_state` reads tensors of modules and optimizers, or else asks their backend.

    Attributes:
      reads_tensors: whether a save reads them, or a listener may.
    """

    def __init__(self, manager: CheckpointManager | NoSave, policy: SavePolicy, read_state: Callable[[], TrainingState],
                 listeners: Sequence[CheckpointSaverListener], *, reads_tensors: bool = True) -> None:
        self._manager = manager
        self._policy = policy
        self._read_state = read_state
        self._listeners = ListenerRunner(listeners)
        # after_save promises that the checkpoint is written.
        self._waits = bool(listeners)
        self.reads_tensors = reads_tensors or bool(listeners)

    def begin(self, step: int, *, is_saved: bool) -> bool:
        """Saves the first state, unless it was restored from a checkpoint; returns whether a listener asks to stop."""
        self._listeners.begin()
        if is_saved:
            self._policy.saved(step)
            return False
        return self.save(step) if self._policy.enabled else False

    def is_due(self, step: int) -> bool:
        """Whether it is time to save."""
        return self._policy.should_save(step)

    def save(self, step: int) -> bool:
        """Saves; returns whether a listener asks to stop."""
        return self._listeners.around(step, self._write)

    def check(self) -> None:
        """Raises the error of a save under way, without waiting for it."""
        self._manager.check()

    def end(self, step: int) -> None:
        """Saves the last state, unless it is saved, and waits for the commit."""
        self._wait()
        if self._policy.should_save_last(step):
            self.save(step)
        self._wait()
        self._listeners.end(step)

    def close(self) -> None:
        """Waits for a save under way, whose error is only told of: training ends with another; saves nothing more."""
        try:
            self._manager.close()
        except TpuspecError as error:
            logger.warning("a checkpoint failed too: %s", error)

    def _write(self) -> None:
        with in_phase("save"):
            self._manager.save(self._read_state(), wait=self._waits)

    def _wait(self) -> None:
        with in_phase("save"):
            self._manager.wait()
