"""From what a user calls a model_dir or a checkpoint to the place itself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from tpuspec.checkpoint.folder import Folder, Location, Storage
from tpuspec.checkpoint.local import LocalFolder, LocalStorage
from tpuspec.checkpoint.remote import RemoteFolder, RemoteStorage
from tpuspec.errors import ConfigError


def is_remote(location: str | os.PathLike[str]) -> bool:
    """Whether a location is an address, such as gs://bucket/run, and no path of this machine."""
    return "://" in os.fspath(location)


def resolve(location: str | os.PathLike[str]) -> Location:
    """Returns a local folder as a Path, an address as it is; file:// is a local folder.

    Raises:
      ConfigError: no file system of fsspec has such addresses, or its package is not installed.
    """
    return _find(location)[0]


def open_storage(location: str | os.PathLike[str], is_complete: Callable[[Path], bool],
                 clock: Callable[[], float] = time.time) -> Storage:
    """Returns the storage of a model_dir.

    Args:
      location: a folder or an address.
      is_complete: whether a local folder holds a whole checkpoint.
      clock: seconds since the epoch.

    Raises:
      ConfigError: as `resolve`.
    """
    found, remote = _find(location)
    if remote is None:
        return LocalStorage(Path(found), is_complete, clock)
    return RemoteStorage(*remote, str(found), clock)


def open_folder(location: str | os.PathLike[str]) -> AbstractContextManager[Folder]:
    """Opens a checkpoint's folder for reading.

    Raises:
      OSError, ValueError: from the block: there is none.
      ConfigError: as `resolve`.
    """
    found, remote = _find(location)
    if remote is None:
        return LocalFolder.opened(Path(found))
    return RemoteFolder.opened(*remote, str(found))


def _find(location: str | os.PathLike[str]) -> tuple[Location, tuple[AbstractFileSystem, str] | None]:
    """Returns what `resolve` does, and the file system of an address with the path in it; None for a local folder."""
    if not is_remote(location):
        return Path(location), None
    address = os.fspath(location)
    fs, path = _filesystem(address)
    return (Path(path), None) if isinstance(fs, LocalFileSystem) else (address, (fs, path))


def _filesystem(address: str) -> tuple[AbstractFileSystem, str]:
    try:
        return fsspec.url_to_fs(address)
    except ImportError as error:
        raise ConfigError(f"{address!r} needs a package that is not installed: {error}") from error
    except Exception as error:
        raise ConfigError(f"{address!r} is no address of a file system that can be opened: "
                          f"{type(error).__name__}: {error}") from error
