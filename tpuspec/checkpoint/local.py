"""Checkpoints in a local folder: renamed into place, locked by the kernel while they are read."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path

from tpuspec.checkpoint.folder import CHECKPOINT_NAME, OpenFile
from tpuspec.checkpoint.manifest import MANIFEST_FILE
from tpuspec.files.commit import commit, discard, sweep
from tpuspec.files.disk import WriteFile, remove, write_file
from tpuspec.files.lock import writer_lock
from tpuspec.files.writable import prove_writable


class LocalFile:
    """An open file; see `OpenFile`."""

    # Small enough for the part to be in the processor's cache still when its checksum is computed.
    part_bytes = 1 << 20

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.size = os.fstat(descriptor).st_size

    def readinto(self, buffer: memoryview) -> int:
        """Reads the next bytes."""
        return os.readv(self._descriptor, [buffer])

    def seek(self, place: int) -> None:
        """Goes on with the byte of this number."""
        os.lseek(self._descriptor, place, os.SEEK_SET)


class LocalFolder:
    """An open folder, under a shared lock, which the kernel drops when the reader dies.

    Args:
      location: of the folder.
      descriptor: of the open folder; wherever it is renamed to, the same files are read.
    """

    def __init__(self, location: Path, descriptor: int) -> None:
        self.location = location
        self._descriptor = descriptor

    @classmethod
    @contextlib.contextmanager
    def opened(cls, location: Path) -> Iterator[LocalFolder]:
        """Opens a folder.

        Raises:
          OSError, ValueError: there is none, or it is a link.
        """
        descriptor = os.open(location, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            yield cls(location, descriptor)
        finally:
            os.close(descriptor)

    def size(self, name: str) -> int:
        """Returns a file's size; -1 where there is none."""
        try:
            found = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        except OSError:
            return -1
        return found.st_size if stat.S_ISREG(found.st_mode) else -1

    def identity(self, name: str) -> Hashable:
        """Returns inode, size and times."""
        found = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[OpenFile]:
        """Opens a regular file; links are not followed."""
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._descriptor)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "it is no regular file", name)
            yield LocalFile(descriptor)
        finally:
            os.close(descriptor)


class LocalStorage:
    """A model_dir on a local disk; see `Storage`.

    Args:
      location: the folder.
      is_complete: whether a folder holds a whole checkpoint, for the sweep.
      clock: seconds since the epoch.
    """

    reads_back = True

    def __init__(self, location: Path, is_complete: Callable[[Path], bool],
                 clock: Callable[[], float] = time.time) -> None:
        self.location = location
        self._is_complete = is_complete
        self._clock = clock

    def path(self, name: str) -> Path:
        """Returns the folder of a checkpoint."""
        return self.location / name

    def names(self) -> dict[str, bool]:
        """Returns the folders, and whether each has a manifest."""
        try:
            return {name: is_committed(self.path(name)) for name in os.listdir(self.location)
                    if CHECKPOINT_NAME.fullmatch(name)}
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def state(self, name: str) -> Hashable | None:
        """Returns inode, size and times of each file."""
        try:
            with os.scandir(self.path(name)) as entries:
                found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
        except OSError:
            return None
        return tuple(sorted((file, each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns)
                            for file, each in found))

    def free_bytes(self) -> int | None:
        """Returns what the disk has left."""
        return shutil.disk_usage(self.location).free

    def commit(self, name: str, write: Callable[[WriteFile, str], None]) -> None:
        """Writes beside the target, then renames."""
        commit(self.path(name), lambda folder: write(self.writes_beside(name, folder.name), folder.name))

    def writes_beside(self, name: str, place: str) -> WriteFile:
        """Returns what writes into the folder that is to be renamed."""
        return lambda file, chunks: write_file(self.location / place / file, chunks)

    def mark(self, token: str) -> None:
        """Makes a file that a sweep removes."""
        write_file(self._mark(token), [])

    def is_marked(self, token: str) -> bool:
        """Whether it is there."""
        return self._mark(token).exists()

    def unmark(self, token: str) -> None:
        """Removes it."""
        remove(self._mark(token))

    def _mark(self, token: str) -> Path:
        return self.location / f".tmp-mark-{token}"

    def discard(self, name: str) -> None:
        """Deletes a checkpoint that nobody reads."""
        discard(self.path(name))

    def check_writable(self) -> None:
        """Makes the folder, and writes a file."""
        prove_writable(self.location)

    def sweep(self) -> None:
        """Deletes or gives back what dead writers left."""
        sweep(self.location, self._is_complete)

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Holds the kernel's lock."""
        return writer_lock(self.location, self._clock)


def is_committed(folder: Path) -> bool:
    """Whether the folder has a manifest, which makes it a checkpoint, though its bytes may have changed since."""
    return not folder.is_symlink() and (folder / MANIFEST_FILE).is_file()
