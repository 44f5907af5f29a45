"""The files of one checkpoint folder, written and read.

  model.safetensors       state dict of the module; model-00001-of-00003.safetensors and so on where it is large
  optimizer.safetensors   tensors of the optimizers, and of the run's other state; likewise
  state.json              all that is no tensor
  manifest.json           step, times, size and checksum of each file; written last, so that a folder with one is whole

They name nothing outside the folder, and nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import re
import zlib
from collections.abc import Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from tpuspec.checkpoint.folder import Folder, OpenFile, WriteFile
from tpuspec.checkpoint.location import open_folder
from tpuspec.checkpoint.manifest import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    NEEDS_TPUSPEC,
    DamagedCheckpointError,
    FileEntry,
    Manifest,
    damaged,
    decode_manifest,
    encode_manifest,
)
from tpuspec.checkpoint.tensors import encode_tensors, read_tensors, split_shards
from tpuspec.errors import CheckpointError

MODEL, OPTIMIZER, STATE_FILE = "model", "optimizer", "state.json"
MAX_SHARD_BYTES = 5_000_000_000
_SHARD = re.compile(rf"({MODEL}|{OPTIMIZER})(?:-([0-9]{{5}})-of-([0-9]{{5}}))?\.safetensors", re.ASCII)
_MAX_THREADS = 4


def write_files(write_file: WriteFile, manifest: Manifest, values: Mapping[str, Any], model: Mapping[str, Tensor],
                optimizer: Mapping[str, Tensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes a checkpoint into an empty folder, each file through to the disk, the manifest last.

    Args:
      write_file: makes a file of the folder.
      manifest: step and times; the files and is_finite are filled in.
      values: what state.json says.
      model, optimizer: storable tensors.
      max_shard_bytes: of a file of tensors; a larger tensor has a file of its own.
    """
    files = {}
    for part, tensors in ((MODEL, model), (OPTIMIZER, optimizer)):
        shards = split_shards(tensors, max_shard_bytes)
        for number, shard in enumerate(shards, start=1):
            name = f"{part}-{number:05}-of-{len(shards):05}" if len(shards) > 1 else part
            written = write_file(f"{name}.safetensors", encode_tensors(shard))
            files[f"{name}.safetensors"] = FileEntry(size=written.size, crc32=written.crc32)
    text = json.dumps(dict(values), allow_nan=False, indent=1).encode()
    written = write_file(STATE_FILE, [text])
    files[STATE_FILE] = FileEntry(size=written.size, crc32=written.crc32)
    manifest = dataclasses.replace(manifest, files=files, is_finite=is_finite(model))
    write_file(MANIFEST_FILE, [encode_manifest(manifest)])


def is_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether no number is NaN or infinite."""
    # Such a number makes every sum such a one, and a sum takes a fraction of the time; but a sum may overflow as well.
    return all(_has_finite_sum(tensor) or bool(tensor.isfinite().all())
               for tensor in tensors.values() if tensor.is_floating_point())


def _has_finite_sum(tensor: Tensor) -> bool:
    if tensor.dtype not in (torch.float32, torch.float64):
        return False
    with np.errstate(all="ignore"):
        # By numpy: torch's sum takes all cores, which the training needs that goes on meanwhile.
        return bool(np.isfinite(tensor.numpy().sum()))


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
        self._shards = {part: self._find_shards(part) for part in (MODEL, OPTIMIZER)}
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
        with self._checked(STATE_FILE) as file:
            content = bytearray(file.size)
            file.fill(memoryview(content))
        return json.loads(content)

    def tensors(self, *parts: str) -> list[dict[str, Tensor]]:
        """Reads the tensors of each part, MODEL or OPTIMIZER; several files at a time.

        Raises:
          DamagedCheckpointError: size or checksum of a file are not the manifest's.
          CheckpointError: a file is none of tensors, or two have the same name.
        """
        names = [name for part in parts for name in self._shards[part]]
        # Reading and checksums let go of Python's lock.
        with ThreadPoolExecutor(min(len(names), _MAX_THREADS), "tpuspec-read") as pool:
            shards = dict(zip(names, pool.map(self._decode, names), strict=True))
        return [self._join([shards[name] for name in self._shards[part]]) for part in parts]

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
                raise CheckpointError(f"The checkpoint file {self._where(name)} is damaged: it is no safetensors file "
                                      f"that this version reads ({error}). Restore an earlier checkpoint.") from error

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


def tpuspec_version() -> str:
    """The installed version, or the first one where tpuspec runs from its source."""
    try:
        return importlib.metadata.version("tpuspec")
    except importlib.metadata.PackageNotFoundError:
        return NEEDS_TPUSPEC
