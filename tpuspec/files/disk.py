"""The system calls of a save, each a function, so that tests can let every single one fail."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

# Small enough for the part to be in the processor's cache still when it is written after its checksum.
_PART_BYTES = 1 << 20


class InUseError(OSError):
    """A folder is being read, or written, by somebody else."""


@dataclass(frozen=True, slots=True)
class Written:
    """What went into a file: its bytes, and their CRC-32."""

    size: int
    crc32: int


WriteFile = Callable[[str, Iterable[bytes | memoryview]], Written]
"""Makes a file of a name and of chunks of bytes, and returns when it is stored; raises OSError."""


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> Written:
    """Makes a file of the chunks and waits until the disk has it; the checksum is that of memory, not of the file.

    Raises:
      OSError: it exists, or cannot be written whole.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        size = crc32 = 0
        for part in parts(chunks):
            crc32 = zlib.crc32(part, crc32)
            size += len(part)
            while part:
                part = part[os.write(descriptor, part):]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Written(size, crc32)


def parts(chunks: Iterable[bytes | memoryview]) -> Iterable[memoryview]:
    """Yields the bytes of the chunks in parts of at most a megabyte."""
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        for start in range(0, len(view), _PART_BYTES):
            yield view[start:start + _PART_BYTES]


def make_folder(path: Path) -> None:
    """Makes a folder."""
    os.mkdir(path)


def sync_folder(path: Path) -> None:
    """Waits until the disk has the names of a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Gives a file or folder another name, at once."""
    os.replace(source, target)


def remove(path: Path) -> None:
    """Removes a file, a link, or a folder with all that is in it."""
    if path.is_symlink() or not path.is_dir():
        os.unlink(path)
        return
    for name in os.listdir(path):
        remove(path / name)
    os.rmdir(path)
