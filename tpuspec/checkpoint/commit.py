"""Folders that appear complete or not at all: written beside their place, synced, renamed.

Three kinds of folder lie beside the committed ones for a moment, and after a crash:
  .tmp-NAME-xxxxxxxx  being written
  .old-NAME-xxxxxxxx  complete, moved aside while another takes its name
  .del-NAME-xxxxxxxx  being deleted
A writer holds an flock on them, which the kernel drops when it dies; `sweep` mends what dead ones left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

_LEFTOVER = re.compile(r"\.(tmp|old|del)-(.+)-[0-9a-f]{8}")


def commit(target: Path, write: Callable[[Path], None]) -> None:
    """Writes a folder and moves it to `target`, replacing what is there; at every moment the old or the new is whole.

    An error, an OSError or what `write` raises, leaves `target` as it was and the unfinished folder removed.

    Args:
      target: folder to make; its parent exists.
      write: writes the files into the folder it is given.
    """
    temp, old = _beside("tmp", target), _beside("old", target)
    with contextlib.ExitStack() as held:
        try:
            temp.mkdir()
            held.enter_context(_held(temp))
            write(temp)
            for file in temp.iterdir():
                _fsync(file)
            _fsync(temp)
            held.enter_context(_held(target))
            _swap_in(temp, target, old)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise
        # Committed: what cannot be deleted now, a later sweep deletes.
        with contextlib.suppress(OSError):
            if os.path.lexists(old):
                _discard_as(_beside("del", target), old)


def _swap_in(temp: Path, target: Path, old: Path) -> None:
    with contextlib.ExitStack() as undo:
        if os.path.lexists(target):
            os.replace(target, old)
            undo.callback(os.replace, old, target)
        os.replace(temp, target)
        undo.callback(os.replace, target, temp)
        _fsync(target.parent)
        undo.pop_all()


def discard(target: Path) -> None:
    """Deletes a committed folder: first its name, then its files, so that half of one is never listed.

    Raises:
      OSError: it does not exist, or cannot be deleted.
    """
    _discard_as(_beside("del", target), target)


def _discard_as(trash: Path, folder: Path) -> None:
    os.replace(folder, trash)
    with _held(trash):
        _fsync(trash.parent)
        _remove(trash)


def _remove(folder: Path) -> None:
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def sweep(parent: Path, is_complete: Callable[[Path], bool]) -> None:
    """Cleans up what dead writers left: an old folder without a successor gets its name back, the rest is deleted.

    Raises:
      OSError: the parent cannot be read or changed.
    """
    for folder in sorted(parent.iterdir()):
        match = _LEFTOVER.fullmatch(folder.name)
        if match is None:
            continue
        with _held(folder) as is_ours:
            if not is_ours:
                continue
            target = parent / match[2]
            if match[1] == "old" and not os.path.lexists(target) and is_complete(folder):
                os.replace(folder, target)
                _fsync(parent)
            else:
                _remove(folder)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Locks a folder, wherever it is renamed to; yields whether the lock was got."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        yield _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another's, or a file system without locks
        return False
    return True


def _beside(kind: str, target: Path) -> Path:
    return target.with_name(f".{kind}-{target.name}-{secrets.token_hex(4)}")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
