"""Checkpoints at an address of fsspec (gs://, s3://, memory://): committed by a manifest that is created only once.

Object stores cannot rename a folder, but they make an object appear whole, and only if there is none. So the files of a
checkpoint are written to their place, and its manifest comes last. Saving a step again writes a next generation of
files beside the first ('1-manifest.json'), so that nothing is overwritten; the newest whole manifest counts. A reader
puts a lease beside them, an empty object whose name says when it ends, and nothing with a live lease is deleted.
"""

from __future__ import annotations

import contextlib
import errno
import re
import secrets
import time
import zlib
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

from fsspec import AbstractFileSystem

from tpuspec.checkpoint.folder import CHECKPOINT_NAME, OpenFile
from tpuspec.checkpoint.manifest import MANIFEST_FILE, is_sealed
from tpuspec.errors import as_os_errors
from tpuspec.files.disk import InUseError, WriteFile, Written, parts
from tpuspec.files.remote_lock import RemoteLock, remote_writer_lock

LEASE_SECONDS = 3600.0
"""How long the reading of one checkpoint may take; what a reader that died has left is in the way no longer."""
_MANIFEST = re.compile(rf"(?:([1-9][0-9]{{0,8}})-)?{re.escape(MANIFEST_FILE)}", re.ASCII)
_LEASE = re.compile(r"\.reader-([0-9]{1,12})-[0-9a-f]{16}", re.ASCII)
_IDENTITY = ("ino", "size", "created", "mtime", "last_modified", "LastModified", "etag", "ETag", "generation")


def list_names(fs: AbstractFileSystem, path: str) -> list[str]:
    """Returns the names in a folder, as they are now; [] where there is none."""
    with as_os_errors():
        fs.invalidate_cache(path)
        try:
            return [entry.rstrip("/").rpartition("/")[2] for entry in fs.ls(path, detail=False)]
        except FileNotFoundError:
            return []


class RemoteFile:
    """A file that is read in ranges; see `OpenFile`."""

    # A request has a latency of its own.
    part_bytes = 16 << 20

    def __init__(self, fs: AbstractFileSystem, path: str, size: int) -> None:
        self._fs, self._path, self.size = fs, path, size
        self._place = 0

    def readinto(self, buffer: memoryview) -> int:
        """Reads the next bytes."""
        end = min(self._place + len(buffer), self.size)
        if end == self._place:
            return 0
        with as_os_errors():
            data: Any = self._fs.cat_file(self._path, start=self._place, end=end)
        buffer[:len(data)] = data
        self._place += len(data)
        return len(data)

    def seek(self, place: int) -> None:
        """Goes on with the byte of this number."""
        self._place = place


class RemoteFolder:
    """One generation of a folder; see `Folder`."""

    def __init__(self, fs: AbstractFileSystem, path: str, location: str, prefix: str) -> None:
        self.location = location
        self._fs, self._path, self._prefix = fs, path, prefix

    @classmethod
    @contextlib.contextmanager
    def opened(cls, fs: AbstractFileSystem, path: str, location: str) -> Iterator[RemoteFolder]:
        """Opens a folder under a lease; without the right to write one it is read all the same.

        Raises:
          OSError: there is none.
        """
        if not list_names(fs, path):
            raise FileNotFoundError(errno.ENOENT, "no such folder", location)
        lease = f"{path}/.reader-{int(time.time() + LEASE_SECONDS)}-{secrets.token_hex(8)}"
        has_lease = False
        with contextlib.suppress(OSError), as_os_errors():
            fs.pipe_file(lease, b"")
            has_lease = True
        try:
            # Only now: a manifest that stands behind the lease stays.
            generation = _newest_whole(fs, path, list_names(fs, path))
            yield cls(fs, path, location, _prefix(generation))
        finally:
            if has_lease:
                with contextlib.suppress(OSError), as_os_errors():
                    fs.rm_file(lease)

    def size(self, name: str) -> int:
        """Returns a file's size; -1 where there is none."""
        try:
            found = self._info(name)
        except OSError:
            return -1
        return int(found["size"]) if found["type"] == "file" else -1

    def identity(self, name: str) -> Hashable:
        """Returns what this file system tells of a file's state."""
        return _identity(self._info(name))

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[OpenFile]:
        """Opens a file."""
        found = self._info(name)
        if found["type"] != "file" or found.get("islink"):
            raise OSError(errno.EINVAL, "it is no regular file", name)
        yield RemoteFile(self._fs, f"{self._path}/{self._prefix}{name}", int(found["size"]))

    def _info(self, name: str) -> dict[str, Any]:
        with as_os_errors():
            return self._fs.info(f"{self._path}/{self._prefix}{name}")


class RemoteStorage:
    """A model_dir at an address of fsspec; see `Storage`.

    Args:
      fs: the file system.
      path: of model_dir in it.
      location: the address.
      clock: seconds since the epoch.
    """

    # What was written is held against its size: to fetch it again would take as long as to write it.
    reads_back = False

    def __init__(self, fs: AbstractFileSystem, path: str, location: str,
                 clock: Callable[[], float] = time.time) -> None:
        self.location = location.rstrip("/")
        self._fs, self._path, self._clock = fs, path.rstrip("/"), clock
        self._lock: RemoteLock | None = None

    def path(self, name: str) -> str:
        """Returns the address of a checkpoint."""
        return f"{self.location}/{name}"

    def names(self) -> dict[str, bool]:
        """Returns the folders, and whether each has a manifest."""
        return {name: bool(_generations(list_names(self._fs, self._at(name)))) for name in self._folders()}

    def state(self, name: str) -> Hashable | None:
        """Returns what this file system tells of each file, in one call."""
        folder = self._at(name)
        try:
            with as_os_errors():
                self._fs.invalidate_cache(folder)
                entries: Any = self._fs.ls(folder, detail=True)
        except OSError:
            return None
        return tuple(sorted((file, *_identity(entry)) for entry in entries
                            if not _LEASE.fullmatch(file := entry["name"].rpartition("/")[2])))

    def free_bytes(self) -> int | None:
        """Returns None."""
        return None

    def commit(self, name: str, write: Callable[[WriteFile, str], None]) -> None:
        """Writes the next generation of a folder, its manifest last, and deletes the one before."""
        folder = self._at(name)
        before = _generations(list_names(self._fs, folder))
        prefix = _prefix(before[-1] + 1 if before else 0)
        with as_os_errors():
            self._fs.makedirs(folder, exist_ok=True)
        write(self.writes_beside(name, prefix), prefix)
        with contextlib.suppress(OSError):  # it is committed; a later sweep deletes
            self._clean(name)

    def writes_beside(self, name: str, place: str) -> WriteFile:
        """Returns what writes files of a generation, whose prefix is `place`."""
        def write_file(file: str, chunks: Iterable[bytes | memoryview]) -> Written:
            return self._write(f"{self._at(name)}/{place}{file}", chunks, is_commit=file == MANIFEST_FILE)

        return write_file

    def mark(self, token: str) -> None:
        """Makes an object."""
        with as_os_errors():
            self._fs.pipe_file(self._mark(token), b"")

    def is_marked(self, token: str) -> bool:
        """Whether it is there."""
        with as_os_errors():
            return f".mark-{token}" in list_names(self._fs, self._path)

    def unmark(self, token: str) -> None:
        """Removes it."""
        with as_os_errors():
            self._fs.rm_file(self._mark(token))

    def _mark(self, token: str) -> str:
        return f"{self._path}/.mark-{token}"

    def discard(self, name: str) -> None:
        """Deletes the manifests, oldest first, then the files, unless somebody reads them."""
        folder = self._at(name)
        names = list_names(self._fs, folder)
        if not names:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", self.path(name))
        if self._is_leased(names):
            raise InUseError(f"{self.path(name)} is in use")
        with as_os_errors():
            for generation in _generations(names):
                self._fs.rm_file(f"{folder}/{_prefix(generation)}{MANIFEST_FILE}")
        self._clean(name)

    def check_writable(self) -> None:
        """Makes the folder, where there are such, and writes an object."""
        with as_os_errors():
            self._fs.makedirs(self._path, exist_ok=True)
            probe = f"{self._path}/.probe"
            self._fs.pipe_file(probe, b"tpuspec")
            self._fs.rm_file(probe)

    def sweep(self) -> None:
        """Deletes files that no manifest counts: of a save or of a deletion that was cut off."""
        for name in self._folders():
            self._clean(name)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds a lock object, which is renewed while this process lives."""
        with remote_writer_lock(self._fs, self._path, self.location, self._clock) as self._lock:
            try:
                yield
            finally:
                self._lock = None

    def _folders(self) -> list[str]:
        return [name for name in list_names(self._fs, self._path) if CHECKPOINT_NAME.fullmatch(name)]

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"

    def _write(self, path: str, chunks: Iterable[bytes | memoryview], *, is_commit: bool) -> Written:
        with as_os_errors():
            if is_commit:
                if self._lock is not None:
                    self._lock.check()
                content = b"".join(chunks)
                self._fs.pipe_file(path, content, mode="create")
                return Written(len(content), zlib.crc32(content))
            size = crc32 = 0
            with self._fs.open(path, "wb") as file:
                for part in parts(chunks):
                    crc32 = zlib.crc32(part, crc32)
                    size += len(part)
                    file.write(part)  # type: ignore[arg-type]
            self._fs.invalidate_cache(path)
            stored = self._fs.info(path)["size"]
        if stored != size:
            raise OSError(errno.EIO, f"{stored} of {size} bytes were stored", path)
        return Written(size, crc32)

    def _clean(self, name: str) -> None:
        """Deletes what belongs to no generation that counts, and leases that have ended, unless somebody may read."""
        folder = self._at(name)
        names = list_names(self._fs, folder)
        if self._is_leased(names):
            return
        generations = _generations(names)
        kept = None if not generations else _prefix(_newest_whole(self._fs, folder, names))
        with as_os_errors():
            # Manifests first, so that none stands without its files.
            for file in sorted(names, key=lambda file: _MANIFEST.fullmatch(file) is None):
                if kept is None or _prefix_of(file) != kept or _LEASE.fullmatch(file):
                    self._fs.rm_file(f"{folder}/{file}")
            if kept is None:
                with contextlib.suppress(OSError):  # object stores have no folders
                    self._fs.rmdir(folder)

    def _is_leased(self, names: list[str]) -> bool:
        ends = [int(match[1]) for match in map(_LEASE.fullmatch, names) if match]
        return any(end > self._clock() for end in ends)


def _identity(found: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((key, str(found[key])) for key in _IDENTITY if key in found)


def _generations(names: Iterable[str]) -> list[int]:
    """Returns the generations that have a manifest, in ascending order."""
    return sorted(int(match[1] or 0) for match in map(_MANIFEST.fullmatch, names) if match)


def _newest_whole(fs: AbstractFileSystem, path: str, names: list[str]) -> int:
    """Returns the newest generation whose manifest was written to its end; without one the newest; 0 for none."""
    generations = _generations(names)
    for generation in reversed(generations):
        with as_os_errors():
            content: Any = fs.cat_file(f"{path}/{_prefix(generation)}{MANIFEST_FILE}")
            if is_sealed(content):
                return generation
    return generations[-1] if generations else 0


def _prefix(generation: int) -> str:
    return f"{generation}-" if generation else ""


def _prefix_of(name: str) -> str:
    match = re.match(r"[1-9][0-9]{0,8}-", name, re.ASCII)
    return match[0] if match else ""
