"""One writer for each model_dir, named to whoever comes second; readers are never held back.

The lock is the kernel's, on a file that stays: whoever dies gives it back. The note beside it only says whose it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from tpuspec.errors import CheckpointError

LOCK_FILE, HOLDER_FILE = ".writer.lock", ".writer.json"


@contextlib.contextmanager
def writer_lock(model_dir: Path, clock: Callable[[], float] = time.time) -> Iterator[None]:
    """Holds the lock of a folder that exists.

    Args:
      model_dir: the folder.
      clock: seconds since the epoch.

    Raises:
      CheckpointError: another process, or another Trainer of this one, holds it; names host, pid and age.
    """
    lock = FileLock(model_dir / LOCK_FILE, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(
            f"One training at a time may write to model_dir {str(model_dir)!r}; {_holder(model_dir, clock())} does. "
            "Wait for it, end it, or use another model_dir.") from error
    except NotImplementedError:  # a file system without locks
        yield
        return
    note = model_dir / HOLDER_FILE
    try:
        with contextlib.suppress(OSError):
            note.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since_seconds": clock()}))
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def _holder(model_dir: Path, now: float) -> str:
    try:
        note = json.loads((model_dir / HOLDER_FILE).read_text())
        # The age by two clocks that may differ: never negative.
        age = max(0, round(now - note["since_seconds"]))
        return f"process {note['pid']} on host {note['host']}, for {age} s,"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
