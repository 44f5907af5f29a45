"""The end of a process that cannot end by itself any more, because a thread hangs or C++ does not return."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import NoReturn

import psutil

_STDERR = 2
_SHOW_CURSOR = b"\x1b[?25h"


def last_words(text: str) -> None:
    """Writes a line to standard error, past all buffers and locks."""
    with contextlib.suppress(OSError):
        # The live line of a progress bar hides the cursor of a terminal.
        os.write(_STDERR, (_SHOW_CURSOR if os.isatty(_STDERR) else b"") + text.encode(errors="replace") + b"\n")


def end_process(code: int) -> NoReturn:
    """Ends this process and all its children at once: no handler, no buffer, no lock is waited for.

    A checkpoint that is being written stays uncommitted; the next run removes it.
    """
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    os._exit(code)


def end_within(seconds: float, code: int) -> None:
    """Ends this process with an exit code, if it has not ended by itself in time."""
    def wait() -> None:
        time.sleep(seconds)
        end_process(code)

    threading.Thread(target=wait, name="tpuspec-end", daemon=True).start()
