"""Disks that are full: by a limit of the kernel for any file, or a small disk in memory that a test fills."""

from __future__ import annotations

import contextlib
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def full_at(num_bytes: int) -> Iterator[None]:
    """Lets the kernel refuse what goes beyond so many bytes of a file; it writes what goes before, as a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class SmallDisk:
    """A disk of its own at a folder.

    Args:
      folder: where it is mounted; made.
      num_bytes: its size.
    """

    def __init__(self, folder: Path, num_bytes: int) -> None:
        self._folder, self._num_bytes = folder, num_bytes
        self._filler = folder / "filler"

    @contextlib.contextmanager
    def mounted(self) -> Iterator[SmallDisk]:
        """Mounts it for the block; skips the test where that is not permitted."""
        self._folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={self._num_bytes}", "tmpfs", str(self._folder)],
                              capture_output=True, text=True, timeout=30)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        try:
            yield self
        finally:
            subprocess.run(["umount", "-l", str(self._folder)], check=True, timeout=30)

    def fill(self) -> None:
        """Leaves no page of it free."""
        with contextlib.suppress(OSError), open(self._filler, "ab", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    def make_room(self) -> None:
        """Takes back what `fill` wrote."""
        self._filler.unlink()
