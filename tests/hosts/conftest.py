"""Several processes on this machine, joined as torchrun's are."""

from __future__ import annotations

import contextlib
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
    with zygote_process() as process:
        yield process


@pytest.fixture(scope="module")
def xla_zygote() -> Iterator[subprocess.Popen[str]]:
    """One whose processes have torch_xla and jax imported."""
    with zygote_process(TEST_ZYGOTE="xla") as process:
        yield process


@contextlib.contextmanager
def zygote_process(**settings: str) -> Iterator[subprocess.Popen[str]]:
    """Starts what forks the processes of tests."""
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("RANK", "WORLD_SIZE", "CPU_NUM_DEVICES")} | settings
    with subprocess.Popen([sys.executable, str(Path(__file__).parent / "zygote.py")], stdin=subprocess.PIPE, text=True,
                          stdout=subprocess.PIPE, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def run_hosts(zygote, tmp_path) -> Callable[..., Outcome]:
    """Runs a job of linear.py in `hosts` processes."""
    return runs(zygote, tmp_path)


@pytest.fixture
def run_xla_hosts(xla_zygote, tmp_path) -> Callable[..., Outcome]:
    """As `run_hosts`, on XLA; `devices` are those of each process, `tpu` fields of TPUConfig."""
    run = runs(xla_zygote, tmp_path)

    def run_on_xla(hosts: int, job: str, *, devices: int = 1, tpu: Any = None, **options: Any) -> Outcome:
        environment = {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(devices), "NPROC": "32"}
        return run(hosts, job, environment=environment, xla=1, tpu=json.dumps(tpu or {}), **options)

    return run_on_xla


def runs(zygote: subprocess.Popen[str], tmp_path: Path) -> Callable[..., Outcome]:
    """Returns what runs a job in a folder of its own below `tmp_path`."""
    def run(hosts: int, job: str, *, kind: str = "linear", environment: dict[str, str] | None = None,
            **options: Any) -> Outcome:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        order = {"hosts": hosts, "kind": kind, "job": job, "out": str(out), "port": free_port(), "seconds": SECONDS,
                 "environment": environment or {},
                 "options": {name: str(value) for name, value in options.items()}}
        zygote.stdin.write(json.dumps(order) + "\n")
        zygote.stdin.flush()
        answer = json.loads(zygote.stdout.readline())
        return Outcome(answer["codes"], answer["seconds"], out)

    return run
