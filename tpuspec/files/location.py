"""From what a user calls a folder or an address to the place itself."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from tpuspec.errors import ConfigError

Location = Path | str
"""A local folder, or an address such as gs://bucket/run, which Path would spoil."""


def is_remote(location: str | os.PathLike[str]) -> bool:
    """Whether a location is an address, such as gs://bucket/run, and no path of this machine."""
    return "://" in os.fspath(location)


def resolve(location: str | os.PathLike[str]) -> Location:
    """Returns a local folder as a Path, an address as it is; file:// is a local folder.

    Raises:
      ConfigError: no file system of fsspec has such addresses, or its package is not installed.
    """
    return find(location)[0]


def find(location: str | os.PathLike[str]) -> tuple[Location, tuple[AbstractFileSystem, str] | None]:
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
