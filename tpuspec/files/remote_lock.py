"""One writer for each remote model_dir: an object that is created only once, and renewed while its writer lives.

No kernel gives it back when a writer dies. It counts as left behind when its process has gone from this very machine,
or when it was not renewed for STALE_SECONDS by the clock of whoever looks.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
from fsspec import AbstractFileSystem

from tpuspec.errors import CheckpointError, as_os_errors
from tpuspec.files.lock import HOLDER_FILE

logger = logging.getLogger(__name__)

RENEW_SECONDS = 20.0
STALE_SECONDS = 120.0


class RemoteLock:
    """The lock object as its holder sees it.

    Args:
      fs: the file system.
      path: of the object.
      mine: what it says of this process; its token is that of no other.
      clock: seconds since the epoch.
    """

    def __init__(self, fs: AbstractFileSystem, path: str, mine: dict[str, Any], clock: Callable[[], float]) -> None:
        self._fs, self._path, self._mine, self._clock = fs, path, mine, clock
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tpuspec-lock", daemon=True)

    def acquire(self) -> dict[str, Any] | None:
        """Takes the lock; returns what its holder says where that is another, and {} where it says nothing."""
        held = self._read()
        if held is not None and _is_left_behind(held, self._clock()):
            logger.warning("The lock %s was left behind by process %s on host %s.", self._path, held.get("pid"),
                           held.get("host"))
            with contextlib.suppress(OSError), as_os_errors():
                self._fs.rm_file(self._path)
        with contextlib.suppress(FileExistsError), as_os_errors():
            self._fs.pipe_file(self._path, self._content(), mode="create")
        # Read again: where two found the same dead writer, one has deleted what the other had made.
        held = self._read() or {}
        if held.get("token") != self._mine["token"]:
            return held
        self._thread.start()
        return None

    def check(self) -> None:
        """Proves that this process holds the lock still.

        Raises:
          OSError: another one took it, after this one was silent for STALE_SECONDS.
        """
        held = self._read() or {}
        if held.get("token") != self._mine["token"]:
            raise OSError(errno.EPERM, f"{_holder(held, self._clock())} has taken the lock of model_dir")

    def release(self) -> None:
        """Gives it back."""
        self._ends.set()
        self._thread.join()
        with contextlib.suppress(OSError), as_os_errors():
            self.check()
            self._fs.rm_file(self._path)

    def _run(self) -> None:
        while not self._ends.wait(RENEW_SECONDS):
            try:
                self.check()
                with as_os_errors():
                    self._fs.pipe_file(self._path, self._content())
            except OSError as error:
                logger.warning("The lock %s could not be renewed: %s", self._path, error)

    def _content(self) -> bytes:
        return json.dumps(self._mine | {"renewed_seconds": self._clock()}).encode()

    def _read(self) -> dict[str, Any] | None:
        """Returns what the object says; None where there is none, {} where it cannot be understood."""
        try:
            with as_os_errors():
                self._fs.invalidate_cache(self._path)
                content = self._fs.cat_file(self._path)
            found = json.loads(content)
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def remote_writer_lock(fs: AbstractFileSystem, path: str, location: str,
                       clock: Callable[[], float] = time.time) -> Iterator[RemoteLock]:
    """Holds the lock of a folder.

    Args:
      fs: the file system.
      path: of the folder in it.
      location: its address, for messages.
      clock: seconds since the epoch.

    Raises:
      CheckpointError: another process, or another Trainer of this one, holds it; names host, pid and age.
      OSError: the file system does not answer.
    """
    process = psutil.Process()
    lock = RemoteLock(fs, f"{path}/{HOLDER_FILE}", {
        "host": socket.gethostname(), "pid": process.pid, "process_began": process.create_time(),
        "since_seconds": clock(), "token": secrets.token_hex(8)}, clock)
    held = lock.acquire()
    if held is not None:
        raise CheckpointError(
            f"One training at a time may write to model_dir {location!r}; {_holder(held, clock())} does. Wait for it, "
            f"end it, or use another model_dir. One that died elsewhere is forgotten after {STALE_SECONDS:.0f} s.")
    try:
        yield lock
    finally:
        lock.release()


def _is_left_behind(note: dict[str, Any], now: float) -> bool:
    if now - float(note.get("renewed_seconds", 0.0)) > STALE_SECONDS:
        return True
    if note.get("host") != socket.gethostname() or "pid" not in note:
        return False
    try:
        return psutil.Process(note["pid"]).create_time() != note.get("process_began")
    except psutil.NoSuchProcess:
        return True


def _holder(note: dict[str, Any], now: float) -> str:
    if "pid" not in note:
        return "another process"
    # The age by two clocks that may differ: never negative.
    age = max(0, round(now - note.get("since_seconds", now)))
    return f"process {note['pid']} on host {note.get('host')}, for {age} s,"
