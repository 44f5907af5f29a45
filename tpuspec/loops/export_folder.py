"""The folder in which exports lie, each a folder <timestamp> that appears whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tpuspec.errors import ConfigError, ConfigTypeError
from tpuspec.files.commit import commit, discard, sweep
from tpuspec.files.disk import Written, make_folder, sync_folder, write_file
from tpuspec.files.location import is_remote
from tpuspec.files.writable import how_to_mend, prove_writable

_TIMESTAMP = re.compile(r"[0-9]{10}", re.ASCII)


def check_base(base: str | os.PathLike[str]) -> Path:
    """Returns the folder in which exports lie, made and found to be writable.

    Raises:
      ConfigTypeError: no path.
      ConfigError: an address, a folder that cannot be written, or one where no name is left for an export.
    """
    if not isinstance(base, str | os.PathLike) or not os.fspath(base):
        raise ConfigTypeError(f"export_dir_base must be a path; got {base!r}.")
    if is_remote(base):
        raise ConfigError(f"export_dir_base must be a folder of this machine; got {os.fspath(base)!r}. Export into "
                          "one, then copy the folder that export() returns.")
    folder = Path(base)
    try:
        prove_writable(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"export_dir_base must be a folder that can be written; {os.fspath(base)!r} is not: {error}. "
                          f"{how_to_mend(error)}, or take another one.") from error
    _next_name(folder, 0)
    return folder


def exports_in(base: Path) -> list[Path]:
    """Returns the exports in a folder, oldest first; other entries are passed over."""
    if not base.is_dir():
        return []
    return sorted(path for path in base.iterdir() if _TIMESTAMP.fullmatch(path.name) and path.is_dir())


def keep_newest(base: Path, num_exports: int) -> None:
    """Deletes all exports in a folder but the newest; other entries are left.

    Raises:
      OSError: one cannot be deleted.
    """
    for folder in exports_in(base)[:-num_exports]:
        discard(folder)


def commit_next(base: Path, write: Callable[[Path], None], clock: Callable[[], float] = time.time) -> Path:
    """Commits a folder named by the time in seconds, always behind those that are there; returns it.

    Args:
      base: as `check_base` returns it.
      write: writes the files into the folder it is given, through to the disk.
      clock: seconds since the epoch.

    Raises:
      ConfigError: no name is left.
      OSError: it could not be written; nothing of it is left.
    """
    sweep(base, lambda folder: False)  # what a killed export left
    while True:
        target = base / _next_name(base, int(clock()))
        try:
            commit(target, write, replaces=False)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and os.path.lexists(target):
                continue  # another process has exported in this very second
            raise
        return target


def _next_name(base: Path, seconds: int) -> str:
    newest = max((int(path.name) for path in exports_in(base)), default=0)
    name = f"{max(seconds, newest + 1):010}"
    if not _TIMESTAMP.fullmatch(name):
        raise ConfigError(f"exports are folders named by ten digits, each above the others; behind {newest} none is "
                          f"left in {base}. Move that folder, or take another export_dir_base.")
    return name


def writing_into(folder: Path) -> Callable[[str, Iterable[bytes | memoryview]], Written]:
    """Returns a function that makes a file of a folder, or of one below it, through to the disk."""
    def write(name: str, chunks: Iterable[bytes | memoryview]) -> Written:
        path = folder / name
        missing = [parent for parent in path.parents if folder in parent.parents and not parent.exists()]
        for parent in reversed(missing):
            make_folder(parent)
        written = write_file(path, chunks)
        for parent in path.parents:
            if folder not in parent.parents:
                break
            sync_folder(parent)
        return written

    return write
