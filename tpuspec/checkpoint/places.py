"""Opens the place that a model_dir or a checkpoint names."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from tpuspec.checkpoint.folder import Folder, Storage
from tpuspec.checkpoint.local import LocalFolder, LocalStorage
from tpuspec.checkpoint.remote import RemoteFolder, RemoteStorage
from tpuspec.files.location import find


def open_storage(location: str | os.PathLike[str], is_complete: Callable[[Path], bool],
                 clock: Callable[[], float] = time.time) -> Storage:
    """Returns the storage of a model_dir.

    Args:
      location: a folder or an address.
      is_complete: whether a local folder holds a whole checkpoint.
      clock: seconds since the epoch.

    Raises:
      ConfigError: as `files.location.resolve`.
    """
    found, remote = find(location)
    if remote is None:
        return LocalStorage(Path(found), is_complete, clock)
    return RemoteStorage(*remote, str(found), clock)


def open_folder(location: str | os.PathLike[str]) -> AbstractContextManager[Folder]:
    """Opens a checkpoint's folder for reading.

    Raises:
      OSError, ValueError: from the block: there is none.
      ConfigError: as `files.location.resolve`.
    """
    found, remote = find(location)
    if remote is None:
        return LocalFolder.opened(Path(found))
    return RemoteFolder.opened(*remote, str(found))
