"""Checkpoints on several hosts: the chief reads and writes them, and the others get what it has read.

A state that is split over the hosts is read and written by each, where all of them see the chief's folder.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import zlib
from collections.abc import Iterator

from tpuspec.checkpoint.reader import Reader
from tpuspec.checkpoint.state import TrainingState
from tpuspec.checkpoint.store import CheckpointStore
from tpuspec.errors import CheckpointError
from tpuspec.files.location import Location, resolve
from tpuspec.spec.coordinator import Coordinator


class ChiefStore(CheckpointStore):
    """A store whose every method is called on all hosts, and whose folder only the chief needs to see.

    Args:
      store: of the chief's model_dir.
      coordinator: of the hosts.
    """

    def __init__(self, store: CheckpointStore, coordinator: Coordinator) -> None:
        super().__init__(store.model_dir)
        self._store = store
        self._coordinator = coordinator

    def prepare(self) -> None:
        if self._coordinator.is_chief:
            self._store.prepare()

    def writing(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return self._store.writing() if self._coordinator.is_chief else contextlib.nullcontext()

    def steps(self) -> list[int]:
        return self._coordinator.share(self._store.steps() if self._coordinator.is_chief else [])

    def check_writable(self) -> None:
        if self._coordinator.is_chief:
            self._store.check_writable()

    def latest(self) -> Location | None:
        path = self._store.latest() if self._coordinator.is_chief else None
        shared = self._coordinator.share(None if path is None else str(path))
        return None if shared is None else resolve(shared)

    @contextlib.contextmanager
    def reading_latest(self) -> Iterator[Location | None]:
        with contextlib.ExitStack() as held:
            path = held.enter_context(self._store.reading_latest()) if self._coordinator.is_chief else None
            shared = self._coordinator.share(None if path is None else str(path))
            yield None if shared is None else resolve(shared)

    @contextlib.contextmanager
    def reading(self, path: str | os.PathLike[str]) -> Iterator[Location]:
        with self._store.reading(path) if self._coordinator.is_chief else contextlib.nullcontext():
            yield resolve(path)

    def read_step(self, path: str | os.PathLike[str]) -> int:
        return self._coordinator.share(self._store.read_step(path) if self._coordinator.is_chief else 0)

    def is_shared(self) -> bool:
        """Whether every host sees the chief's folder, and may write there."""
        token = self._coordinator.exchange(secrets.token_hex(4), name="a mark in model_dir")[0]
        if self._coordinator.is_chief:
            self._store.mark(token)
        try:
            self._coordinator.exchange(None, name="the mark is there")
            return all(self._coordinator.exchange(self._store.is_marked(token), name="who sees the mark"))
        finally:
            if self._coordinator.is_chief:
                self._store.unmark(token)

    def load_stored(self, path: str | os.PathLike[str], *, optimizers: bool = True) -> TrainingState:
        """As `load`; but where every host sees the checkpoint, tensors are read when a part of them is asked for."""
        seen = None
        if self._coordinator.is_chief:
            seen = repr(self._store.verify(path))
        else:
            with contextlib.suppress(CheckpointError), Reader.open(path) as reader:
                seen = repr(reader.manifest)
        crc32 = None if seen is None else zlib.crc32(seen.encode())
        if len(set(self._coordinator.exchange(crc32, name="who sees the checkpoint"))) > 1:
            return self.load(path, optimizers=optimizers)
        return self._store.load_stored(path, optimizers=optimizers)

    def load(self, path: str | os.PathLike[str], *, optimizers: bool = True) -> TrainingState:
        tree = None
        if self._coordinator.is_chief:
            state = self._store.load(path, optimizers=optimizers)
            tree = [state.global_step, state.model, state.optimizers, state.extra]
        step, model, optimizer_states, extra = self._coordinator.share(tree)  # type: ignore[misc]
        return TrainingState(global_step=step, model=model, optimizers=optimizer_states, extra=extra)


def store_of(store: CheckpointStore, coordinator: Coordinator) -> CheckpointStore:
    """Returns the store as all hosts use it together; on one host, the store itself."""
    return store if coordinator.num_hosts == 1 else ChiefStore(store, coordinator)
