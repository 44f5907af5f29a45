"""Addresses of fsspec to test with: memory://, and the local disk by fsspec alone, in which nothing is renamed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import fsspec
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem


class Disk(DirFileSystem):
    """The local disk as a remote file system: file:// itself is taken for a local folder."""

    protocol = "disk"

    def __init__(self, **options):
        super().__init__(path="/", fs=LocalFileSystem(skip_instance_cache=True), skip_instance_cache=True, **options)

    @property
    def fsid(self):
        return "disk"


fsspec.register_implementation("disk", Disk, clobber=True)


class Stopped(BaseException):
    """Stands for the death of the process."""


@contextlib.contextmanager
def dying_at(monkeypatch, fs_class, number: int | None) -> Iterator[list[str]]:
    """Lets the n-th change of a file system be the last; yields the names of all that were made.

    A file that is open for writing counts when it is opened: it stays empty where that was the last change.
    """
    made: list[str] = []

    def wrap(name):
        real = getattr(fs_class, name)

        def call(self, path, *args, **kwargs):
            if name == "open" and "r" in (kwargs.get("mode") or (args[0] if args else "rb")):
                return real(self, path, *args, **kwargs)
            if number is not None and len(made) > number:
                raise Stopped
            made.append(f"{name} {path}")
            if len(made) - 1 == number:
                if name == "open":
                    real(self, path, "wb").close()
                raise Stopped
            return real(self, path, *args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("pipe_file", "open", "rm_file", "rmdir"):
            patch.setattr(fs_class, name, wrap(name))
        yield made
