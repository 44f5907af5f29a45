"""The process that forks the trainings of these tests: it has imported torch_xla once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def open_zygote() -> Iterator[subprocess.Popen[str]]:
    """Starts `tests.faults.train_zygote`, and ends it with the block."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PJRT_DEVICE": "CPU"}
    with subprocess.Popen([sys.executable, "-m", "tests.faults.train_zygote"], stdin=subprocess.PIPE, text=True,
                          stdout=subprocess.PIPE, cwd=ROOT, env=environment) as zygote:
        assert zygote.stdout is not None and zygote.stdin is not None
        assert zygote.stdout.readline() == "ready\n"
        yield zygote
        zygote.stdin.close()
