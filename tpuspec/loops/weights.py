"""Which weights a call starts from: the newest checkpoint, a named one, or those in memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from tpuspec.checkpoint.store import CheckpointStore
from tpuspec.errors import ConfigError
from tpuspec.loops.session import Session
from tpuspec.spec.scaffold import Scaffold


def restore_for_training(session: Session, store: CheckpointStore, scaffold: Scaffold) -> bool:
    """Loads the newest checkpoint, unless the state in memory is as new; else initialises by the scaffold.

    Returns:
      Whether the state now in memory stands in a checkpoint.

    Raises:
      CheckpointError: the checkpoint does not fit.
      ConfigError: the scaffold's ready_fn says that something is missing.
    """
    path = store.latest()
    saved_step = None if path is None else store.read_step(path)
    if path is not None and saved_step is not None and (
            not session.has_state or saved_step > session.global_step):
        session.load_training_state(store.load(path), scaffold)
    elif not session.has_state and scaffold.init_fn is not None and session.module is not None:
        for replica in session.replicas:
            if replica.model is not None:
                scaffold.init_fn(replica.model)
    check_ready(session, scaffold)
    session.has_state = True
    return saved_step == session.global_step


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
    evaluated = path
    if path is None and (latest := store.latest()) is not None:
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
    try:
        session.load_model(tensors, scaffold)
        session.set_global_step(step)
        check_ready(session, scaffold)
        yield evaluated
    finally:
        session.load_model(own)
        session.set_global_step(own_step)
