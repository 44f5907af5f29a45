"""CheckpointStore: the checkpoints of one model_dir, each a folder checkpoint-<step>."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable, Hashable, Iterator, Mapping

from tpuspec.checkpoint.folder import CHECKPOINT_NAME
from tpuspec.checkpoint.format import (
    MAX_SHARD_BYTES,
    MODEL,
    OPTIMIZER,
    is_finite,
    tpuspec_version,
    write_files,
    write_index,
)
from tpuspec.checkpoint.index import Part, write_part
from tpuspec.checkpoint.joint import JointSave
from tpuspec.checkpoint.manifest import DamagedCheckpointError, Manifest
from tpuspec.checkpoint.places import open_storage
from tpuspec.checkpoint.reader import Reader, is_complete
from tpuspec.checkpoint.state import TrainingState, pack, storable_tensors, unpack
from tpuspec.checkpoint.stored import read_stored
from tpuspec.errors import CheckpointError, ConfigError
from tpuspec.files.disk import InUseError, WriteFile
from tpuspec.files.location import Location, resolve
from tpuspec.files.writable import NO_ROOM, how_to_mend
from tpuspec.spec.pieces import Pieces

logger = logging.getLogger(__name__)

# Errors of a disk that may pass: what was written is thrown away, and all of it written again.
_PASSING = frozenset({errno.EIO, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ETIMEDOUT, errno.ESTALE})
_RETRY_AFTER_SECONDS = (0.1, 1.0)
_MOST_ATTEMPTS = 5


class CheckpointStore:
    """Writes, lists, reads and deletes the checkpoints of a model_dir; one process writes, any may read.

    Args:
      model_dir: a folder, or an address of fsspec such as gs://bucket/run; `prepare` makes it. It may be moved between
        runs.
      max_shard_bytes: of a file of tensors.
      clock: seconds since the epoch, noted in each checkpoint.
      sleep: waits before a failed save is tried again.

    Raises:
      ConfigError: no file system of fsspec has such an address.
    """

    def __init__(self, model_dir: str | os.PathLike[str], *, max_shard_bytes: int = MAX_SHARD_BYTES,
                 clock: Callable[[], float] = time.time, sleep: Callable[[float], None] = time.sleep) -> None:
        self._storage = open_storage(model_dir, is_complete, clock)
        self.model_dir: Location = self._storage.location
        self._max_shard_bytes = max_shard_bytes
        self._clock = clock
        self._sleep = sleep
        # Location -> state of the files whose checksums were right, so that each is read through once; and manifest.
        self._verified: dict[str, tuple[Hashable, Manifest]] = {}
        self._started_at_seconds: float | None = None
        self._told: set[Location] = set()

    def prepare(self) -> None:
        """Makes the folder, proves that it can be written, and mends what a killed writer left in it.

        Raises:
          ConfigError: model_dir is no folder, or cannot be written.
        """
        self.check_writable()
        try:
            self._storage.sweep()
        except OSError as error:
            raise self._not_writable(error) from error

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Makes this process the one writer of the folder, and prepares it.

        Raises:
          ConfigError: as `prepare`.
          CheckpointError: another training writes there; names it.
        """
        self.check_writable()
        with self._storage.lock():
            self.prepare()
            yield

    def check_writable(self) -> None:
        """Makes the folder and proves that it can be written.

        Raises:
          ConfigError: model_dir is no folder, or cannot be written.
        """
        try:
            self._storage.check_writable()
        except (OSError, ValueError) as error:
            raise self._not_writable(error) from error

    def _not_writable(self, error: Exception) -> ConfigError:
        return ConfigError(f"model_dir must be a folder that can be written; {str(self.model_dir)!r} is not: {error}. "
                           f"{how_to_mend(error)}, or set another model_dir.")

    def path(self, step: int) -> Location:
        """Returns the folder of the checkpoint of `step`, whether it exists or not; an address as a str."""
        return self._storage.path(_name(step))

    def steps(self) -> list[int]:
        """Returns the steps of the committed checkpoints in ascending order; other folders are passed over.

        Raises:
          CheckpointError: model_dir exists and cannot be read.
          ConfigError: no folder can have its name.
        """
        return sorted(step for step, is_committed in self._names().items() if is_committed)

    def _names(self) -> dict[int, bool]:
        try:
            names = self._storage.names()
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:  # no folder can be called so
                raise self._not_writable(error) from error
            raise CheckpointError(f"model_dir {self.model_dir} cannot be read: {error}.") from error
        return {int(match[1]): names[name] for name in names if (match := CHECKPOINT_NAME.fullmatch(name))}

    @contextlib.contextmanager
    def reading_latest(self) -> Iterator[Location | None]:
        """Yields the path of the newest checkpoint as `latest` does, and keeps it from deletion within the block.

        Raises:
          CheckpointError: as `latest`, and where checkpoints vanish faster than they can be opened.
        """
        for _ in range(_MOST_ATTEMPTS):
            path = self.latest()
            if path is None:
                yield None
                return
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(self.reading(path))
                except CheckpointError:
                    if path == self.latest():
                        raise
                    continue  # the training that writes here has deleted it meanwhile, and has a newer one
                yield path
                return
        raise CheckpointError(f"The newest checkpoint of {self.model_dir} was replaced {_MOST_ATTEMPTS} times before "
                              "it could be opened. Raise keep_checkpoint_max of the training that writes there.")

    @contextlib.contextmanager
    def reading(self, path: str | os.PathLike[str]) -> Iterator[Location]:
        """Keeps a checkpoint from deletion within the block, by this process or another one; yields its path.

        Raises:
          CheckpointError: `path` is no checkpoint that can be read.
        """
        with Reader.open(path):
            yield resolve(path)

    def latest(self) -> Location | None:
        """Returns the checkpoint of the highest step whose checksums are right, or None; others are told of.

        Raises:
          CheckpointError: the newest is of a later format.
        """
        for step, is_committed in sorted(self._names().items(), reverse=True):
            path = self.path(step)
            if not is_committed:
                self._tell(path, f"{path} is passed over: without a manifest it is no checkpoint that was committed.")
                continue
            try:
                self.verify(path)
            except DamagedCheckpointError as error:
                self._tell(path, f"{error} Falling back to the checkpoint before it.")
                continue
            return path
        return None

    def _tell(self, path: Location, what: str) -> None:
        """Warns once of each path."""
        if path not in self._told:
            self._told.add(path)
            logger.warning("%s", what)

    def verify(self, path: str | os.PathLike[str]) -> Manifest:
        """Checks every byte of a checkpoint, unless it did so before and the files are the same.

        Raises:
          DamagedCheckpointError: a byte has changed; names the file.
          CheckpointError: `path` is no checkpoint that can be read.
        """
        key = os.fspath(path)
        known, state = self._verified.get(key), self._state(key)
        if known is not None and state is not None and known[0] == state:
            return known[1]
        with Reader.open(path) as reader:
            if any(reader.size(file) < 0 for file in reader.manifest.files):
                reader.verify()  # raises
            if state is None:  # of another folder
                state = (repr(reader.manifest), reader.fingerprint())
            if known is None or known[0] != state:
                reader.verify()
                self._verified[key] = state, reader.manifest
            return reader.manifest

    def _state(self, path: str) -> Hashable | None:
        """Returns what changes when a file of a checkpoint does; None for one of another folder.

        It is asked for before the files are read: one that changes meanwhile is another one the next time.
        """
        folder, _, name = path.rpartition("/")
        return self._storage.state(name) if folder == os.fspath(self.model_dir) else None

    def save(self, state: TrainingState, joint: JointSave | None = None) -> Location:
        """Commits a checkpoint; one of the same step is replaced. All of `state` was read when it returns.

        Args:
          state: all of it; or, with others, what this process has, of which the chief's counts where all have it.
          joint: the save of all processes; None where this one saves alone.

        Returns:
          The folder of the checkpoint.

        Raises:
          CheckpointError: `state` cannot be stored, or the folder not be written; what was there is untouched.
        """
        name = _name(state.global_step)
        model = storable_tensors(state.model, "model")
        values, tensors = pack({"optimizers": state.optimizers, "extra": state.extra}, "state")
        own = {} if joint is None else {MODEL: joint.own_pieces(model), OPTIMIZER: joint.own_pieces(tensors)}
        if joint is not None and not joint.leads:
            joint.follow(lambda place: self._write_part(self._storage.writes_beside(name, place), joint, own))
            return self.path(state.global_step)
        now = self._clock()
        if self._started_at_seconds is None:
            self._started_at_seconds = self._read_started_at_seconds()
        started = now if self._started_at_seconds is None else self._started_at_seconds
        manifest = Manifest(global_step=state.global_step, saved_at_seconds=now, started_at_seconds=started,
                            is_finite=True, tpuspec_version=tpuspec_version(), files={})

        def write(write_file: WriteFile, place: str) -> None:
            nonlocal manifest
            if joint is None:
                manifest = write_files(write_file, manifest, values, model, tensors, self._max_shard_bytes)
                return
            joint.begin(place)
            try:
                part = self._write_part(write_file, joint, own)
            finally:
                others = joint.gather()  # none of them writes when another place is named
            for other in others:
                part.add(other)
            manifest = write_index(write_file, manifest, values, part)

        with joint.ending() if joint is not None else contextlib.nullcontext():
            self._commit(name, write, num_bytes=sum(value.nbytes for tensors_of_part in (
                own.values() if joint is not None else (model, tensors)) for value in tensors_of_part.values()))
        self._started_at_seconds = started
        path = self.path(state.global_step)
        if not self._storage.reads_back and (written := self._storage.state(name)) is not None:
            self._verified[os.fspath(path)] = written, manifest
        return path

    def _write_part(self, write_file: WriteFile, joint: JointSave, own: Mapping[str, Mapping[str, Pieces]]) -> Part:
        part = write_part(write_file, joint.number, own, self._max_shard_bytes)
        part.is_finite = all(is_finite({name: piece.tensor}) for name, value in own[MODEL].items()
                             for piece in value.pieces)
        return part

    def _commit(self, name: str, write: Callable[[WriteFile, str], None], *, num_bytes: int) -> None:
        failed = f"The checkpoint {name} could not be written to {str(self.model_dir)!r}; the earlier ones are "
        failed += "untouched."
        free: int | None = None
        for pause in (*_RETRY_AFTER_SECONDS, None):
            try:
                free = self._storage.free_bytes()
                if free is not None and free < num_bytes:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return self._storage.commit(name, write)
            except (OSError, ValueError) as error:
                number = getattr(error, "errno", None)
                if number in NO_ROOM:
                    known = "" if free is None else f", and {free:,} are free"
                    raise CheckpointError(f"{failed} It needs {num_bytes:,} bytes{known}: {error}. Make room, or lower "
                                          "keep_checkpoint_max.") from error
                if number not in _PASSING or pause is None:
                    raise CheckpointError(f"{failed} {type(error).__name__}: {error}") from error
                logger.warning("%s %s Trying again in %s s.", failed, error, pause)
                self._sleep(pause)
        return None

    def read_step(self, path: str | os.PathLike[str]) -> int:
        """Returns the global step of a checkpoint.

        Raises:
          CheckpointError: `path` is no checkpoint that can be read.
        """
        known = self._verified.get(os.fspath(path))
        if known is not None and known[0] == self._state(os.fspath(path)):
            return known[1].global_step
        with Reader.open(path) as reader:
            return reader.manifest.global_step

    def load(self, path: str | os.PathLike[str], *, optimizers: bool = True) -> TrainingState:
        """Reads a checkpoint of this or of another folder, and checks what it reads.

        Args:
          path: folder of the checkpoint.
          optimizers: whether to read the optimizers' and the run's state; without it, their file is not opened.

        Raises:
          CheckpointError: `path` is no checkpoint that can be read.
        """
        with Reader.open(path) as reader:
            step = reader.manifest.global_step
            if not optimizers:
                return TrainingState(global_step=step, model=reader.tensors(MODEL)[0])
            model, tensors = reader.tensors(MODEL, OPTIMIZER)
            rest = unpack(reader.values(), tensors)
            return TrainingState(global_step=step, model=model, optimizers=rest["optimizers"], extra=rest["extra"])

    def load_stored(self, path: str | os.PathLike[str], *, optimizers: bool = True) -> TrainingState:
        """As `load`, but tensors of several elements are read when a part of them is asked for, and not checked.

        Args:
          path: of a checkpoint that was verified.
          optimizers: as in `load`.
        """
        with Reader.open(path) as reader:
            manifest = reader.manifest
        return read_stored(path, manifest, optimizers=optimizers)

    def mark(self, token: str) -> None:
        """Leaves a file in model_dir by which others see that they look into the same folder; `unmark` removes it."""
        self._storage.mark(token)

    def is_marked(self, token: str) -> bool:
        """Whether that file is there, and this process may write beside it."""
        try:
            if not self._storage.is_marked(token):
                return False
            self._storage.check_writable()
        except (OSError, ValueError):
            return False
        return True

    def unmark(self, token: str) -> None:
        """Removes the file."""
        with contextlib.suppress(OSError):  # a sweep may have been here
            self._storage.unmark(token)

    def delete(self, step: int) -> None:
        """Deletes the checkpoint of `step`.

        Raises:
          InUseError: it is being read.
          CheckpointError: there is none, or it cannot be deleted.
        """
        try:
            self._storage.discard(_name(step))
        except InUseError:
            raise
        except OSError as error:
            raise CheckpointError(f"The checkpoint of step {step} could not be deleted: {error}.") from error
        self._verified.pop(os.fspath(self.path(step)), None)

    def manifests(self) -> list[Manifest]:
        """Returns the manifests of the committed checkpoints whose bytes are right, in ascending order of step."""
        found = (self._whole(step) for step in self.steps())
        return [manifest for manifest in found if manifest is not None]

    def _read_started_at_seconds(self) -> float | None:
        """Returns the time of the first commit ever made here, though it may be deleted since; None without any."""
        for step in reversed(self.steps()):
            if (manifest := self._whole(step)) is not None:
                return manifest.started_at_seconds
        return None

    def _whole(self, step: int) -> Manifest | None:
        # A damaged checkpoint must not stop the saving of a good one; who loads it gets the error.
        try:
            return self.verify(self.path(step))
        except CheckpointError:
            return None


def _name(step: int) -> str:
    return f"checkpoint-{step}"
