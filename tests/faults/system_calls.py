"""A shim under tpuspec/files/disk.py: lets the n-th system call of a save fail, write half, or end the process."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from tpuspec.files import disk

CALLS = ("open", "write", "fsync", "replace", "mkdir", "unlink", "rmdir")


class Killed(BaseException):
    """Stands for the death of the process: nothing may run after it, so cleaning up fails too."""


class SystemCalls:
    """os, as disk.py sees it.

    Args:
      fail_at: number of the call that fails, from 0; None counts only.
      how: 'error' (EIO), 'no_space', 'half' (half of a write, then the end of the process) or 'kill'.
    """

    def __init__(self, fail_at: int | None = None, how: str = "error") -> None:
        self.made: list[str] = []
        self._fail_at, self._how = fail_at, how
        self._is_dead = False

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def call(*args, **kwargs):
            if self._is_dead:
                raise Killed
            number = len(self.made)
            self.made.append(name)
            if number != self._fail_at:
                return real(*args, **kwargs)
            if self._how == "half" and name == "write":
                real(args[0], args[1][:len(args[1]) // 2])
            if self._how in ("half", "kill"):
                self._is_dead = True
                raise Killed
            raise OSError(errno.EIO if self._how == "error" else errno.ENOSPC, f"call {number} is {name}")

        return call


@contextlib.contextmanager
def system_calls(calls: SystemCalls) -> Iterator[SystemCalls]:
    """Puts the shim under disk.py for the block."""
    disk.os = calls
    try:
        yield calls
    finally:
        disk.os = os


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))
