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
from collections.abc import Callable, Iterator
from pathlib import Path

from tpuspec.files.disk import InUseError, make_folder, remove, rename, sync_folder

_LEFTOVER = re.compile(r"\.(tmp|old|del)-(.+)-[0-9a-f]{8}")


def commit(target: Path, write: Callable[[Path], None], *, replaces: bool = True) -> None:
    """Writes a folder and moves it to `target`, replacing what is there; at every moment the old or the new is whole.

    An error, an OSError or what `write` raises, leaves `target` as it was and the unfinished folder removed.

    Args:
      target: folder to make; its parent exists.
      write: writes the files into the folder it is given, through to the disk.
      replaces: False refuses a target that is a folder with something in it, with the errno ENOTEMPTY, or a file, with
        ENOTDIR; an empty folder is replaced.
    """
    temp, old = _beside("tmp", target), _beside("old", target)
    with contextlib.ExitStack() as held:
        try:
            make_folder(temp)
            held.enter_context(_held(temp))
            write(temp)
            sync_folder(temp)
            _swap_in(temp, target, old if replaces else None)
        except BaseException:
            with contextlib.suppress(OSError):  # the error on its way says more; a later sweep removes it
                remove(temp)
            raise
        # Committed: what cannot be deleted now, a later sweep deletes.
        with contextlib.suppress(OSError):
            if os.path.lexists(old):
                _discard_as(_beside("del", target), old)


def _swap_in(temp: Path, target: Path, old: Path | None) -> None:
    with contextlib.ExitStack() as undo:
        if old is not None and os.path.lexists(target):
            rename(target, old)
            undo.callback(rename, old, target)
        rename(temp, target)
        undo.callback(rename, target, temp)
        sync_folder(target.parent)
        undo.pop_all()


def discard(target: Path) -> None:
    """Deletes a committed folder: first its name, then its files, so that half of one is never listed.

    Raises:
      InUseError: somebody reads it.
      OSError: it does not exist, or cannot be deleted.
    """
    _discard_as(_beside("del", target), target)


def _discard_as(trash: Path, folder: Path) -> None:
    with _held(folder) as is_ours:
        if not is_ours and os.path.lexists(folder):
            raise InUseError(f"{folder} is in use")
        rename(folder, trash)
        sync_folder(trash.parent)
        remove(trash)


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
                rename(folder, target)
                sync_folder(parent)
            else:
                remove(folder)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Locks a folder, wherever it is renamed to; yields whether the lock was got."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield not os.path.lexists(folder) or folder.is_symlink()
        return
    try:
        yield _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # another's
        return False
    except OSError:  # a file system without locks: the writer's lock on model_dir is all there is
        return True
    return True


def _beside(kind: str, target: Path) -> Path:
    return target.with_name(f".{kind}-{target.name}-{secrets.token_hex(4)}")
