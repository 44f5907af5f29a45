"""These tests need an XLA client with 8 CPU devices: a process of their own.

`tests/test_several_devices.py` starts it; by hand: SPMD_DEVICES=8 pytest tests/spmd.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NUM_DEVICES = int(os.environ.get("SPMD_DEVICES", "0"))

if not NUM_DEVICES:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def one_device(tmp_path_factory):
    """What tests/spmd/runs.py computes on one XLA device, in a process of its own: scenario -> its results.

    '<scenario> folder' is the folder of its checkpoints.
    """
    folder = tmp_path_factory.mktemp("one_device")
    run_on_one_device("train", str(folder))
    return json.loads((folder / "results.json").read_text())


def run_on_one_device(*arguments):
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_USE_SPMD", "CPU_NUM_DEVICES")}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent.parent)
    done = subprocess.run([sys.executable, str(Path(__file__).parent / "runs.py"), *arguments], env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
