"""Every backend trains and evaluates every recipe to the same weights and metrics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.free_port import free_port

pytestmark = [pytest.mark.slow, pytest.mark.minutes]

ROOT = Path(__file__).resolve().parent.parent.parent
BACKENDS = {"native1": 1, "native3": 3, "xla1": 1, "xla4": 1, "spmd4": 1}  # and their processes
MOST = 1e-5


def start(backend: str, num_processes: int, out: Path) -> list[subprocess.Popen[str]]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": backend[-1],
                    "XLA_THREAD_POOL_SIZE": "64", "NPROC": "32", "PJRT_NPROC": "32"}
    port = str(free_port())
    ranks = [{"RANK": str(rank), "WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
             for rank in range(num_processes)] if num_processes > 1 else [{}]
    return [subprocess.Popen([sys.executable, str(Path(__file__).parent / "backend_run.py"), backend, str(out)],
                             env=environment | rank, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                             text=True) for rank in ranks]


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Results by backend, those of each process of several."""
    out = tmp_path_factory.mktemp("table")
    results = {}
    for backend, num_processes in BACKENDS.items():
        processes = start(backend, num_processes, out)
        errors = [process.communicate(timeout=400)[1] for process in processes]
        assert [process.returncode for process in processes] == [0] * num_processes, errors
        for rank in range(num_processes):
            results[f"{backend}, process {rank}"] = json.loads((out / f"{backend}-{rank}.json").read_text())
    return results


@pytest.mark.parametrize("recipe", ["digits", "gpt_bytes", "tabular"])
def test_all_backends_agree(table, recipe):
    reference = table["native1, process 0"][recipe]
    for backend, results in table.items():
        found = results[recipe]
        assert np.abs(np.subtract(found["weights"], reference["weights"])).max() < MOST, backend
        assert found["metrics"].keys() == reference["metrics"].keys()
        for name, value in found["metrics"].items():
            assert np.abs(np.subtract(value, reference["metrics"][name])).max() < MOST, (backend, name)
