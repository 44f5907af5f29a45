"""The files of one checkpoint folder, read and checked: whole, or as much of a tensor as is asked for."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import zlib
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import torch
from torch import Tensor

from tpuspec.checkpoint.folder import Folder, OpenFile
from tpuspec.checkpoint.format import MODEL, OPTIMIZER, STATE_FILE, tpuspec_version
from tpuspec.checkpoint.index import Entry, Part, StoredPiece
from tpuspec.checkpoint.manifest import (
    INDEX_FILE,
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    DamagedCheckpointError,
    FileEntry,
    Manifest,
    damaged,
    decode_manifest,
)
from tpuspec.checkpoint.places import open_folder
from tpuspec.checkpoint.tensors import HeaderEntry, bytes_of, read_header, read_tensors
from tpuspec.errors import CheckpointError

_SHARD = re.compile(rf"({MODEL}|{OPTIMIZER})(?:-([0-9]{{5}})-of-([0-9]{{5}}))?\.safetensors", re.ASCII)
_MAX_THREADS = 4
_BLOCK_BYTES = 64 << 20
"""Of a tensor of which a part is wanted, read at a time."""


def is_complete(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder has a manifest and the files it names, in their sizes; no checksum is computed."""
    try:
        with Reader.open(folder) as reader:
            return all(reader.size(name) == entry.size for name, entry in reader.manifest.files.items())
    except CheckpointError:
        return False


class Reader:
    """An open checkpoint: what is read through it is of one commit, and no retention deletes it meanwhile.

    Args:
      folder: the open folder.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        with self._open(MANIFEST_FILE) as file:
            if file.size > MAX_MANIFEST_BYTES:
                raise damaged(self._where(MANIFEST_FILE), f"checksum mismatch ({file.size} bytes, too many)")
            content = bytearray(file.size)
            size = file.readinto(memoryview(content))
        self.manifest: Manifest = decode_manifest(
            bytes(content[:size]), self._where(MANIFEST_FILE), version=tpuspec_version())
        self._headers: dict[str, dict[str, HeaderEntry]] = {}
        self._shards = {part: [] if INDEX_FILE in self.manifest.files else self._find_shards(part)
                        for part in (MODEL, OPTIMIZER)}
        if STATE_FILE not in self.manifest.files:
            raise self._incomplete(STATE_FILE)

    @classmethod
    @contextlib.contextmanager
    def open(cls, location: str | os.PathLike[str]) -> Iterator[Self]:
        """Opens a checkpoint.

        Raises:
          CheckpointError: the folder is no checkpoint, is damaged, or is of a later format.
        """
        with contextlib.ExitStack() as stack:
            try:
                folder = stack.enter_context(open_folder(location))
            except FileNotFoundError as error:
                raise _no_checkpoint(location, "does not exist") from error
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{os.fspath(location)!r} is no checkpoint that can be read: {error}.") from error
            yield cls(folder)

    def size(self, name: str) -> int:
        """Returns a file's size; -1 where there is none."""
        return self._folder.size(name)

    def fingerprint(self) -> Hashable:
        """What changes when a file is written."""
        return tuple(self._folder.identity(name) for name in sorted(self.manifest.files))

    def values(self) -> dict[str, Any]:
        """Reads state.json.

        Raises:
          DamagedCheckpointError: size or checksum are not the manifest's.
        """
        return json.loads(self._content(STATE_FILE))

    def tensors(self, *parts: str) -> list[dict[str, Tensor]]:
        """Reads the tensors of each part, MODEL or OPTIMIZER; several files at a time.

        Raises:
          DamagedCheckpointError: size or checksum of a file are not the manifest's.
          CheckpointError: a file is none of tensors, or two have the same name.
        """
        if INDEX_FILE in self.manifest.files:
            return [self._join_pieces(self._index.tensors.get(part, {})) for part in parts]
        names = [name for part in parts for name in self._shards[part]]
        # Reading and checksums let go of Python's lock.
        with ThreadPoolExecutor(min(len(names), _MAX_THREADS), "tpuspec-read") as pool:
            shards = dict(zip(names, pool.map(self._decode, names), strict=True))
        return [self._join([shards[name] for name in self._shards[part]]) for part in parts]

    def entries(self, part: str) -> dict[str, Entry]:
        """Returns of each tensor of a part, MODEL or OPTIMIZER, where it lies; none is read.

        Raises:
          CheckpointError: as `tensors`; no checksum of a file of tensors is computed.
        """
        if INDEX_FILE in self.manifest.files:
            return self._index.tensors.get(part, {})
        return {key: Entry(found.dtype, found.shape, [StoredPiece(name, key, (0,) * len(found.shape), found.shape)])
                for name in self._shards[part] for key, found in self._header(name).items()}

    def read_box(self, entry: Entry, starts: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Reads a part of a tensor, of which only those pieces are opened that have something of it.

        Raises:
          CheckpointError: a file cannot be read, or is not what its index says; no checksum is computed.
        """
        made = torch.empty(tuple(sizes), dtype=entry.dtype)
        for piece in entry.pieces:
            first = [max(start, offset) for start, offset in zip(starts, piece.offsets, strict=True)]
            end = [min(start + size, offset + num) for start, size, offset, num in
                   zip(starts, sizes, piece.offsets, piece.shape, strict=True)]
            if all(a < b for a, b in zip(first, end, strict=True)):
                place = tuple(slice(a - start, b - start) for a, b, start in zip(first, end, starts, strict=True))
                within = [slice(a - offset, b - offset) for a, b, offset in zip(first, end, piece.offsets, strict=True)]
                self._read_piece(piece, entry.dtype, within, made[place])
        return made

    def _read_piece(self, piece: StoredPiece, dtype: torch.dtype, within: Sequence[slice], into: Tensor) -> None:
        """Reads a part of a piece, some rows of its first dim at a time."""
        found = self._header(piece.file).get(piece.key)
        if found is None or (found.dtype, found.shape) != (dtype, piece.shape):
            raise CheckpointError(f"The checkpoint file {self._where(piece.file)} is damaged: it has no {piece.key!r} "
                                  f"of {dtype} {list(piece.shape)}. Restore an earlier checkpoint.")
        rows, *others = within or [slice(0, 1)]
        into = into if within else into.reshape(1)
        row_bytes = math.prod(piece.shape[1:]) * dtype.itemsize
        at_once = max(1, _BLOCK_BYTES // row_bytes)
        with self._open(piece.file) as file:
            file.seek(found.start + rows.start * row_bytes)
            for row in range(rows.start, rows.stop, at_once):
                block = torch.empty((min(at_once, rows.stop - row), *piece.shape[1:]), dtype=dtype)
                self._fill(file, bytes_of(block), piece.file)
                into[row - rows.start:row - rows.start + len(block)] = block[(slice(None), *others)]

    def _header(self, name: str) -> dict[str, HeaderEntry]:
        if name not in self._headers:
            with self._open(name) as file:
                try:
                    entries, _ = read_header(lambda buffer: self._fill(file, buffer, name), file.size)
                except ValueError as error:
                    raise self._no_tensors(name, error) from error
            self._headers[name] = {entry.name: entry for entry in entries}
        return self._headers[name]

    def _fill(self, file: OpenFile, buffer: memoryview, name: str) -> None:
        while buffer:
            num_read = file.readinto(buffer[:file.part_bytes])
            if not num_read:
                raise damaged(self._where(name), "it ends too early")
            buffer = buffer[num_read:]

    @functools.cached_property
    def _index(self) -> Part:
        try:
            index = Part.decode(self._content(INDEX_FILE))
        except ValueError as error:
            raise damaged(self._where(INDEX_FILE), str(error)) from error
        index.check()
        if missing := {piece.file for entries in index.tensors.values() for entry in entries.values()
                       for piece in entry.pieces} - self.manifest.files.keys():
            raise self._incomplete(min(missing))
        return index

    def _join_pieces(self, entries: dict[str, Entry]) -> dict[str, Tensor]:
        joined = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in entries.items()}
        files: dict[str, list[tuple[str, StoredPiece]]] = {}
        for name, entry in entries.items():
            for piece in entry.pieces:
                files.setdefault(piece.file, []).append((name, piece))

        def read(file: str) -> None:
            found = self._decode(file)
            for name, piece in files[file]:
                part = found.pop(piece.key, None)
                if part is None or part.shape != piece.shape or part.dtype != joined[name].dtype:
                    raise self._incomplete(f"{piece.key} in {file}")
                place = zip(piece.offsets, piece.shape, strict=True)
                joined[name][tuple(slice(start, start + size) for start, size in place)] = part

        with ThreadPoolExecutor(max(1, min(len(files), _MAX_THREADS)), "tpuspec-read") as pool:
            list(pool.map(read, files))
        return joined

    def _content(self, name: str) -> bytearray:
        with self._checked(name) as file:
            content = bytearray(file.size)
            file.fill(memoryview(content))
        return content

    def verify(self) -> None:
        """Checks every byte against the manifest's checksums, part by part.

        Raises:
          DamagedCheckpointError: names the file.
        """
        with ThreadPoolExecutor(min(len(self.manifest.files), _MAX_THREADS), "tpuspec-verify") as pool:
            list(pool.map(self._verify, self.manifest.files))

    def _find_shards(self, part: str) -> list[str]:
        """Returns the files of a part in their order."""
        found = {int(match[2] or 1): (name, int(match[3] or 1)) for name in self.manifest.files
                 if (match := _SHARD.fullmatch(name)) and match[1] == part}
        total = max((total for _, total in found.values()), default=1)
        for number in range(1, total + 1):
            if found.get(number, ("", 0))[1] != total:
                raise self._incomplete(f"{part}.safetensors" if total == 1 else
                                       f"{part}-{number:05}-of-{total:05}.safetensors")
        return [found[number][0] for number in range(1, total + 1)]

    def _incomplete(self, name: str) -> CheckpointError:
        return CheckpointError(f"{str(self._folder.location)!r} is no complete checkpoint: it has no {name}.")

    def _join(self, shards: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        joined: dict[str, Tensor] = {}
        for shard in shards:
            if twice := joined.keys() & shard.keys():
                raise CheckpointError(f"The checkpoint {self._folder.location} has {min(twice)!r} in two of its files. "
                                      "Restore an earlier checkpoint.")
            joined |= shard
        return joined

    def _decode(self, name: str) -> dict[str, Tensor]:
        with self._checked(name) as file:
            try:
                return read_tensors(file.fill, file.size)
            except ValueError as error:
                file.drain()  # where the bytes have changed, that is what is wrong
                file.check()
                raise self._no_tensors(name, error) from error

    def _no_tensors(self, name: str, error: ValueError) -> CheckpointError:
        return CheckpointError(f"The checkpoint file {self._where(name)} is damaged: it is no safetensors file that "
                               f"this version reads ({error}). Restore an earlier checkpoint.")

    def _verify(self, name: str) -> None:
        with self._checked(name) as file:
            file.drain()

    @contextlib.contextmanager
    def _checked(self, name: str) -> Iterator[_CheckedFile]:
        """Opens a file, and checks it at the end of the block."""
        with self._open(name) as file:
            checked = _CheckedFile(file, name, self.manifest.files[name], self._where(name))
            yield checked
            checked.check()

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[OpenFile]:
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(self._folder.open(name))
            except FileNotFoundError as error:
                if name == MANIFEST_FILE:
                    raise _no_checkpoint(self._folder.location, f"has no {name}") from error
                raise damaged(self._where(name), "it is missing") from error
            except OSError as error:  # a link, among others
                raise damaged(self._where(name), f"it cannot be read ({error})") from error
            try:
                yield file
            except OSError as error:
                raise damaged(self._where(name), f"it cannot be read ({error})") from error

    def _where(self, name: str) -> str:
        return f"{self._folder.location}/{name}"


class _CheckedFile:
    """A file of a checkpoint with the checksum of what was read of it.

    Raises:
      DamagedCheckpointError: it has another size than the manifest says; no memory was taken for it.
    """

    def __init__(self, file: OpenFile, name: str, entry: FileEntry, where: str) -> None:
        self._file, self._name, self._entry, self._where = file, name, entry, where
        self._crc32 = self._num_read = 0
        self.size = entry.size
        if file.size != entry.size:
            raise self._mismatch(f"{file.size} bytes in place of {entry.size}")

    def fill(self, buffer: memoryview) -> None:
        """Reads the next bytes, as many as the buffer has."""
        while buffer:
            num_read = self._file.readinto(buffer[:self._file.part_bytes])
            if not num_read:
                raise self._mismatch(f"{self._num_read} bytes in place of {self.size}")
            self._crc32 = zlib.crc32(buffer[:num_read], self._crc32)
            self._num_read += num_read
            buffer = buffer[num_read:]

    def drain(self) -> None:
        """Reads the rest, for its checksum."""
        part = memoryview(bytearray(min(self._file.part_bytes, max(1, self.size - self._num_read))))
        while self._num_read < self.size:
            self.fill(part[:self.size - self._num_read])

    def check(self) -> None:
        """Checks what was read, which must be all.

        Raises:
          DamagedCheckpointError: its bytes have changed.
        """
        if self._crc32 != self._entry.crc32:
            raise self._mismatch("its bytes have changed")

    def _mismatch(self, what: str) -> DamagedCheckpointError:
        return damaged(self._where, f"checksum mismatch in {self._name} ({what})")


def _no_checkpoint(location: str | os.PathLike[str], why: str) -> CheckpointError:
    return CheckpointError(f"{os.fspath(location)!r} is no checkpoint: it {why}. Give the path of a folder "
                           "checkpoint-<step>, such as latest_checkpoint() returns.")
