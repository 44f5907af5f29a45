"""Several processes on this machine, joined as torchrun's are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.free_port import free_port

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 240


@dataclass(frozen=True)
class Outcome:
    """What came of a test's processes; `seconds` from the end of the first to that of the last."""

    codes: list[int]
    seconds: float
    out: Path

    def result(self, host: int) -> dict[str, Any]:
        return json.loads((self.out / f"result{host}.json").read_text())

    def results(self) -> list[dict[str, Any]]:
        assert set(self.codes) == {0}, self.stderr(next(i for i, code in enumerate(self.codes) if code))
        return [self.result(host) for host in range(len(self.codes))]

    def stderr(self, host: int) -> str:
        return (self.out / f"stderr{host}").read_text()


@pytest.fixture(scope="module")
def zygote() -> Iterator[subprocess.Popen[str]]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    with subprocess.Popen([sys.executable, str(Path(__file__).parent / "zygote.py")], stdin=subprocess.PIPE, text=True,
                          stdout=subprocess.PIPE, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def run_hosts(zygote, tmp_path) -> Callable[..., Outcome]:
    """Runs a job of linear.py in `hosts` processes."""
    def run(hosts: int, job: str, **options: Any) -> Outcome:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        order = {"hosts": hosts, "job": job, "out": str(out), "port": free_port(), "seconds": SECONDS,
                 "options": {name: str(value) for name, value in options.items()}}
        zygote.stdin.write(json.dumps(order) + "\n")
        zygote.stdin.flush()
        answer = json.loads(zygote.stdout.readline())
        return Outcome(answer["codes"], answer["seconds"], out)

    return run
