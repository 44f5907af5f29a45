"""What a fault must leave behind: its own error, checkpoints that verify, and no thread or process."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.checkpoints import damaged_steps
from tpuspec.checkpoint.store import CheckpointStore

LEFT_SECONDS = 10.0

# Of the process, not of a run: fsspec's loop, and what multiprocessing starts once for all spawned children.
LASTING_THREADS = frozenset({"fsspecIO"})
LASTING_PROCESS = "multiprocessing.resource_tracker"


def running_threads() -> set[threading.Thread]:
    # A dummy is a thread of C++ that once called Python.
    return {thread for thread in threading.enumerate()
            if not isinstance(thread, threading._DummyThread) and thread.name not in LASTING_THREADS}


def running_children() -> set[psutil.Process]:
    running = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE and LASTING_PROCESS not in " ".join(process.cmdline()):
                running.add(process)
    return running


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Fails if the block leaves a thread or a process that is still alive after LEFT_SECONDS."""
    threads, children = running_threads(), running_children()
    yield
    deadline = time.monotonic() + LEFT_SECONDS
    while left := [*(running_threads() - threads), *(running_children() - children)]:
        assert time.monotonic() < deadline, f"still alive after {LEFT_SECONDS:.0f} s: {left}"
        time.sleep(0.02)


@contextlib.contextmanager
def fault(kind: type[BaseException], *parts: str) -> Iterator[pytest.ExceptionInfo[Any]]:
    """Expects an error whose text has all of `parts`, and, while it is still held, nothing else left of the run."""
    with nothing_left():
        with pytest.raises(kind, match=parts[0]) as caught:
            yield caught
        for part in parts[1:]:
            assert re.search(part, str(caught.value)), f"{part!r} is not in: {caught.value}"


def verified_steps(model_dir: Path) -> list[int]:
    """Returns the steps of the checkpoints in a folder, each of which must verify."""
    store = CheckpointStore(model_dir)
    assert damaged_steps(store) == []
    return store.steps()
