"""Which weights a call starts from: the newest checkpoint, a named one, or those in memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from tpuspec.checkpoint.state import TrainingState
from tpuspec.checkpoint.store import CheckpointStore
from tpuspec.checkpoint.stored import read_whole
from tpuspec.errors import CheckpointError, ConfigError
from tpuspec.loops.session import Session
from tpuspec.spec.scaffold import Scaffold


def read_for_training(session: Session, store: CheckpointStore) -> TrainingState | None:
    """Reads the newest checkpoint, unless the state in memory is as new.

    Raises:
      CheckpointError: there are checkpoints, and all of them are damaged.
    """
    path = store.latest()
    if path is None:
        if not session.has_state and (steps := store.steps()):
            raise CheckpointError(f"All checkpoints in {store.model_dir} are damaged ({steps}); training from the "
                                  "start would bury them. Put a whole one back, or use another model_dir.")
        return None
    if session.has_state and store.read_step(path) <= session.global_step:
        return None
    return store.load(path) if session.backend.split_state is None else store.load_stored(path)


def restore_for_training(session: Session, state: TrainingState | None, scaffold: Scaffold, *,
                         reads_module: bool = True) -> None:
    """Loads a state that was read, if there is one; else initialises by the scaffold, unless there is a state already.

    Args:
      session: the model.
      state: as `read_for_training` returned it.
      scaffold: may initialise, restore and check the module.
      reads_module: whether hooks and the like may read the module before the first step: every host has all of it then.

    Raises:
      CheckpointError: the checkpoint does not fit.
      ConfigError: the scaffold's ready_fn says that something is missing.
    """
    if state is not None:
        if reads_module or scaffold.ready_fn is not None:
            state = read_whole(state)
        session.load_training_state(state, scaffold)
    elif not session.has_state and scaffold.init_fn is not None and session.module is not None:
        for replica in session.replicas:
            if replica.model is not None:
                scaffold.init_fn(replica.model)
    check_ready(session.module, scaffold)
    session.has_state = True


def check_ready(module: nn.Module | None, scaffold: Scaffold) -> None:
    """Asks the scaffold whether the model is ready, where there is one.

    Raises:
      ConfigError: it says what is missing.
    """
    if scaffold.ready_fn is not None and module is not None:
        missing = scaffold.ready_fn(module)
        if missing is not None:
            raise ConfigError(f"the model is not ready, says the scaffold's ready_fn: {missing}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenWeights:
    """Where the weights of a call are.

    Attributes:
      path: of the checkpoint to load; None where those in memory are as new, or there is none.
      live: the session whose weights are as new; None where a checkpoint is to be loaded, or nothing was trained.
      holder: path of the checkpoint that holds the weights; None where none does.
    """

    path: str | None
    live: Session | None
    holder: str | None

    def read(self, store: CheckpointStore, scaffold: Scaffold) -> tuple[dict[str, Tensor], int]:
        """Reads the weights to the host; returns the state dict and its global step.

        Raises:
          CheckpointError: the checkpoint cannot be read.
        """
        if self.path is not None:
            state = store.load(self.path, optimizers=False)
            return state.model, state.global_step
        assert self.live is not None, "asked where there is something to read"
        return self.live.model_state(scaffold), self.live.global_step


@contextlib.contextmanager
def choosing_weights(trained: Session | None, store: CheckpointStore,
                     checkpoint_path: str | os.PathLike[str] | None) -> Iterator[ChosenWeights]:
    """Finds the weights of a call, and keeps their checkpoint from deletion within the block.

    Args:
      trained: holds the newest weights in memory; None before any training.
      store: of checkpoints.
      checkpoint_path: a checkpoint's folder; None takes the newest weights of memory and store.

    Raises:
      CheckpointError: the checkpoint is none.
    """
    live = trained if trained is not None and trained.has_state else None
    if checkpoint_path is not None:
        path = os.fspath(checkpoint_path)
        with store.reading(path):
            yield ChosenWeights(path=path, live=None, holder=path)
        return
    # While somebody evaluates, predicts from or exports a checkpoint, the retention of a training elsewhere leaves it.
    with store.reading_latest() as latest:
        saved_step = -1 if latest is None else store.read_step(latest)
        if live is None or saved_step > live.global_step:
            newest = None if latest is None else str(latest)
            yield ChosenWeights(path=newest, live=None, holder=newest)
        else:
            yield ChosenWeights(path=None, live=live, holder=str(latest) if saved_step == live.global_step else None)


@contextlib.contextmanager
def borrowed_weights(session: Session, trained: Session | None, store: CheckpointStore,
                     checkpoint_path: str | os.PathLike[str] | None, scaffold: Scaffold) -> Iterator[str | None]:
    """Puts the weights to evaluate into a session, and the session's own back at the end.

    Args:
      session: evaluates.
      trained: holds the newest weights in memory, often the same session; None before any training.
      store: of checkpoints.
      checkpoint_path: a checkpoint's folder; None takes the newest weights of memory and store.
      scaffold: may bring its own restore.

    Yields:
      Path of the checkpoint that holds the weights; None where none does.

    Raises:
      CheckpointError: the checkpoint is none, or does not fit.
    """
    with contextlib.ExitStack() as held:
        chosen = held.enter_context(choosing_weights(trained, store, checkpoint_path))
        own_step = session.global_step
        if chosen.path is None and (chosen.live is None or (chosen.live is session and scaffold.restore is None)):
            check_ready(session.module, scaffold)
            yield chosen.holder
            return
        tensors, step = chosen.read(store, scaffold)
        own = session.model_state()
        held.enter_context(session.keeping_buffers())
        try:
            session.load_model(tensors, scaffold)
            session.set_global_step(step)
            check_ready(session.module, scaffold)
            yield chosen.holder
        finally:
            session.load_model(own)
            session.set_global_step(own_step)
