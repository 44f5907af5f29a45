"""What a store of checkpoints needs of the place where they lie: a local folder, or an address of fsspec."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Protocol

from tpuspec.files.disk import WriteFile
from tpuspec.files.location import Location

CHECKPOINT_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,18})", re.ASCII)


class OpenFile(Protocol):
    """A file that is read from its start, or from where `seek` says."""

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    @property
    def part_bytes(self) -> int:
        """How many to read at a time."""
        ...

    def readinto(self, buffer: memoryview) -> int:
        """Reads the next bytes into a buffer and returns their number; 0 at the end."""
        ...

    def seek(self, place: int) -> None:
        """Goes on with the byte of this number."""
        ...


class Folder(Protocol):
    """A checkpoint that is being read: all of one commit, which no retention deletes meanwhile."""

    @property
    def location(self) -> Location:
        """Where it lies, for messages."""
        ...

    def size(self, name: str) -> int:
        """Returns a file's size; -1 where there is none."""
        ...

    def identity(self, name: str) -> Hashable:
        """Returns what changes when a file is written again."""
        ...

    def open(self, name: str) -> AbstractContextManager[OpenFile]:
        """Opens a file.

        Raises:
          FileNotFoundError: there is none.
          OSError: it cannot be read, or is no regular file.
        """
        ...


class Storage(Protocol):
    """The folders checkpoint-<step> of one model_dir, each of which appears whole or not at all."""

    @property
    def location(self) -> Location:
        """Where model_dir lies."""
        ...

    @property
    def reads_back(self) -> bool:
        """Whether what was just written is read again before older checkpoints may go."""
        ...

    def path(self, name: str) -> Location:
        """Returns the location of one of them."""
        ...

    def names(self) -> dict[str, bool]:
        """Returns the names of all that are called so, and whether each is committed; {} without model_dir.

        Raises:
          OSError: it cannot be read.
        """
        ...

    def state(self, name: str) -> Hashable | None:
        """Returns what changes when a file of one of them does; None where there is none, or that cannot be told."""
        ...

    def free_bytes(self) -> int | None:
        """Returns the space that is left; None where there is no such bound."""
        ...

    def commit(self, name: str, write: Callable[[WriteFile, str], None]) -> None:
        """Makes one, in place of one of that name; at every moment the old or the new is whole.

        Args:
          name: of the folder.
          write: writes the files; the last one is the manifest. It is told, too, by what other processes name the
            place to `writes_beside`.

        Raises:
          OSError: it could not be written; what was there is untouched.
        """
        ...

    def writes_beside(self, name: str, place: str) -> WriteFile:
        """Returns what adds files to one that another process is committing.

        Args:
          name: of the folder.
          place: as that process was told.
        """
        ...

    def mark(self, token: str) -> None:
        """Leaves an empty file in model_dir, by which others see that they look into the same folder.

        Raises:
          OSError: it cannot be written.
        """
        ...

    def is_marked(self, token: str) -> bool:
        """Whether that file is there."""
        ...

    def unmark(self, token: str) -> None:
        """Removes it.

        Raises:
          OSError: it cannot be removed.
        """
        ...

    def discard(self, name: str) -> None:
        """Deletes one: first what makes it a checkpoint, then its files, so that half of one is never listed.

        Raises:
          InUseError: somebody reads it.
          OSError: it does not exist, or cannot be deleted.
        """
        ...

    def check_writable(self) -> None:
        """Makes model_dir and proves that it can be written.

        Raises:
          OSError, ValueError: it cannot.
        """
        ...

    def sweep(self) -> None:
        """Mends what a killed writer left.

        Raises:
          OSError: it cannot.
        """
        ...

    def lock(self) -> AbstractContextManager[None]:
        """Makes this process the one writer.

        Raises:
          CheckpointError: another one writes; names it.
        """
        ...
