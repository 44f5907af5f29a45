"""The process that forks the trainings of these tests: it has imported torch_xla once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Zygote:
    """Orders runs of `tests.faults.train_zygote`; see its `start` for what an order says."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(self, **order: Any) -> int:
        """Starts a run; returns its process number."""
        return self._ask(order)

    def wait(self, pid: int) -> int:
        """Waits for the end of a run; returns its exit code, that of a signal negative."""
        return self._ask({"pid": pid})

    def _ask(self, order: dict[str, Any]) -> int:
        assert self._process.stdout is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@contextmanager
def open_zygote() -> Iterator[Zygote]:
    """Starts `tests.faults.train_zygote`, and ends it with the block."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PJRT_DEVICE": "CPU"}
    with subprocess.Popen([sys.executable, "-m", "tests.faults.train_zygote"], stdin=subprocess.PIPE, text=True,
                          stdout=subprocess.PIPE, cwd=ROOT, env=environment) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        yield Zygote(process)
        process.stdin.close()
