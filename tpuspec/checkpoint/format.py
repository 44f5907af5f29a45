"""The files of one checkpoint folder, written and read.

  model.safetensors       state dict of the module
  optimizer.safetensors   tensors of the optimizers, and of the run's other state
  state.json              all that is no tensor
  manifest.json           step, times, size and checksum of each file; written last, so that a folder with one is whole

They name nothing outside the folder, and nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from tpuspec.checkpoint.disk import write_file
from tpuspec.checkpoint.manifest import (
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    NEEDS_TPUSPEC,
    FileEntry,
    Manifest,
    damaged,
    decode_manifest,
    encode_manifest,
)
from tpuspec.checkpoint.tensors import decode_tensors, encode_tensors
from tpuspec.errors import CheckpointError

MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.safetensors", "state.json"
_FILES = (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE)
_PART_BYTES = 1 << 20


def write_files(folder: Path, manifest: Manifest, values: Mapping[str, Any], model: Mapping[str, Tensor],
                optimizer: Mapping[str, Tensor]) -> None:
    """Writes a checkpoint into an empty folder, each file through to the disk.

    Args:
      folder: where.
      manifest: step and times; the files and is_finite are filled in.
      values: what state.json says.
      model, optimizer: storable tensors.
    """
    text = json.dumps(dict(values), allow_nan=False, indent=1).encode()
    contents = {MODEL_FILE: encode_tensors(model), OPTIMIZER_FILE: encode_tensors(optimizer), STATE_FILE: [text]}
    files = {}
    for name, chunks in contents.items():
        written = write_file(folder / name, chunks)
        files[name] = FileEntry(size=written.size, crc32=written.crc32)
    manifest = dataclasses.replace(manifest, files=files, is_finite=is_finite(model))
    write_file(folder / MANIFEST_FILE, [encode_manifest(manifest)])


def is_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether no number is NaN or infinite."""
    for tensor in tensors.values():
        if tensor.dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16) and tensor.numel():
            low, high = tensor.aminmax()
            if not (low.isfinite() and high.isfinite()):
                return False
    return True


def is_complete(folder: Path) -> bool:
    """Whether the folder has a manifest and the files it names, in their sizes; no checksum is computed."""
    try:
        with Reader.open(folder) as reader:
            return all(reader.size(name) == entry.size for name, entry in reader.manifest.files.items())
    except CheckpointError:
        return False


def is_committed(folder: Path) -> bool:
    """Whether the folder has a manifest, which makes it a checkpoint, though its bytes may have changed since."""
    return not folder.is_symlink() and (folder / MANIFEST_FILE).is_file()


class Reader:
    """An open checkpoint folder: what is read through it is of one commit, and no retention deletes it meanwhile.

    Args:
      folder: for messages.
      descriptor: of the open folder.
    """

    def __init__(self, folder: Path, descriptor: int) -> None:
        self.folder = folder
        self._descriptor = descriptor
        content = self._content(MANIFEST_FILE, MAX_MANIFEST_BYTES)
        self.manifest: Manifest = decode_manifest(content, str(folder / MANIFEST_FILE), version=tpuspec_version())
        missing = [name for name in _FILES if name not in self.manifest.files]
        if missing:
            raise CheckpointError(f"{str(folder)!r} is no complete checkpoint: it has no {missing[0]}.")

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Path) -> Iterator[Self]:
        """Opens a checkpoint.

        Raises:
          CheckpointError: the folder is no checkpoint, is damaged, or is of a later format.
        """
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise _no_checkpoint(folder, "does not exist") from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{str(folder)!r} is no checkpoint that can be read: {error}.") from error
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            yield cls(folder, descriptor)
        finally:
            os.close(descriptor)

    def size(self, name: str) -> int:
        """Returns a file's size; -1 where there is none."""
        try:
            found = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        except OSError:
            return -1
        return found.st_size if stat.S_ISREG(found.st_mode) else -1

    def fingerprint(self) -> tuple[object, ...]:
        """What changes when a file is written: inode, size and time of each."""
        found = [os.stat(name, dir_fd=self._descriptor, follow_symlinks=False) for name in sorted(self.manifest.files)]
        return tuple((file.st_ino, file.st_size, file.st_mtime_ns, file.st_ctime_ns) for file in found)

    def read(self, name: str) -> bytes:
        """Reads a file and checks it.

        Raises:
          DamagedCheckpointError: size or checksum are not the manifest's.
        """
        entry = self.manifest.files[name]
        content = self._content(name, entry.size)
        self._check(name, entry, len(content), zlib.crc32(content))
        return content

    def values(self) -> dict[str, Any]:
        """Reads state.json."""
        return json.loads(self.read(STATE_FILE))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Reads a file of tensors."""
        return decode_tensors(self.read(name), str(self.folder / name))

    def verify(self) -> None:
        """Checks every byte against the manifest's checksums, part by part.

        Raises:
          DamagedCheckpointError: names the file.
        """
        for name, entry in self.manifest.files.items():
            with self._file(name) as descriptor:
                size = crc32 = 0
                while part := os.read(descriptor, _PART_BYTES):
                    crc32, size = zlib.crc32(part, crc32), size + len(part)
            self._check(name, entry, size, crc32)

    def _check(self, name: str, entry: FileEntry, size: int, crc32: int) -> None:
        if size != entry.size or crc32 != entry.crc32:
            what = f"{size} bytes in place of {entry.size}" if size != entry.size else "its bytes have changed"
            raise damaged(str(self.folder / name), f"checksum mismatch in {name} ({what})")

    def _content(self, name: str, max_bytes: int) -> bytes:
        with self._file(name) as descriptor:
            size = os.fstat(descriptor).st_size
            if size > max_bytes:  # no more memory than what the manifest promised
                raise damaged(str(self.folder / name), f"checksum mismatch in {name} ({size} bytes, too many)")
            parts = []
            while part := os.read(descriptor, max(1, size)):
                parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    @contextlib.contextmanager
    def _file(self, name: str) -> Iterator[int]:
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
                                 dir_fd=self._descriptor)
        except FileNotFoundError as error:
            if name == MANIFEST_FILE:
                raise _no_checkpoint(self.folder, f"has no {name}") from error
            raise damaged(str(self.folder / name), "it is missing") from error
        except OSError as error:  # a link, among others
            raise damaged(str(self.folder / name), f"it cannot be read ({error})") from error
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise damaged(str(self.folder / name), "it is no regular file")
            yield descriptor
        except OSError as error:
            raise damaged(str(self.folder / name), f"it cannot be read ({error})") from error
        finally:
            os.close(descriptor)


def _no_checkpoint(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{str(folder)!r} is no checkpoint: it {why}. Give the path of a folder checkpoint-<step>, "
                           "such as latest_checkpoint() returns.")


def tpuspec_version() -> str:
    """The installed version, or the first one where tpuspec runs from its source."""
    try:
        return importlib.metadata.version("tpuspec")
    except importlib.metadata.PackageNotFoundError:
        return NEEDS_TPUSPEC
