"""Which weights a call starts from: the newest checkpoint, a named one, or those in memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from tpuspec.checkpoint.state import TrainingState
from tpuspec.checkpoint.store import CheckpointStore
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
    return store.load(path) if not session.has_state or store.read_step(path) > session.global_step else None


def restore_for_training(session: Session, state: TrainingState | None, scaffold: Scaffold) -> None:
    """Loads a state that was read, if there is one; else initialises by the scaffold, unless there is a state already.

    Raises:
      CheckpointError: the checkpoint does not fit.
      ConfigError: the scaffold's ready_fn says that something is missing.
    """
    if state is not None:
        session.load_training_state(state, scaffold)
    elif not session.has_state and scaffold.init_fn is not None and session.module is not None:
        for replica in session.replicas:
            if replica.model is not None:
                scaffold.init_fn(replica.model)
    check_ready(session, scaffold)
    session.has_state = True


def check_ready(session: Session, scaffold: Scaffold) -> None:
    """Asks the scaffold whether the model is ready.

    Raises:
      ConfigError: it says what is missing.
    """
    if scaffold.ready_fn is not None and session.module is not None:
        missing = scaffold.ready_fn(session.module)
        if missing is not None:
            raise ConfigError(f"the model is not ready, says the scaffold's ready_fn: {missing}")


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
    live_step = trained.global_step if trained is not None and trained.has_state else None
    path = os.fspath(checkpoint_path) if checkpoint_path is not None else None
    with contextlib.ExitStack() as held:
        # While somebody evaluates, or predicts from, a checkpoint, the retention of a training elsewhere leaves it.
        latest = held.enter_context(store.reading_latest() if path is None else store.reading(path))
        evaluated = path
        if path is None and latest is not None:
            saved_step = store.read_step(latest)
            if live_step is None or saved_step >= live_step:
                evaluated = str(latest)
            if live_step is None or saved_step > live_step:
                path = str(latest)
        own_step = session.global_step
        if path is not None:
            state = store.load(path, optimizers=False)
            tensors, step = state.model, state.global_step
        elif live_step is not None and (trained is not session or scaffold.restore is not None):
            assert trained is not None
            tensors, step = trained.model_state(scaffold), live_step
        else:
            check_ready(session, scaffold)
            yield evaluated
            return
        own = session.model_state()
        held.enter_context(session.keeping_buffers())
        try:
            session.load_model(tensors, scaffold)
            session.set_global_step(step)
            check_ready(session, scaffold)
            yield evaluated
        finally:
            session.load_model(own)
            session.set_global_step(own_step)
