"""Runs the tests that need a mesh in processes whose XLA clients have 4 and 8 CPU devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = "test_mp_05_parts_are_of_equal_size_but_the_last_ones"


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [4, 8])
def test_the_tests_of_a_mesh_pass(num_devices):
    environment = {**os.environ, "SPMD_DEVICES": str(num_devices)}
    environment.pop("CPU_NUM_DEVICES", None)
    model_parallelism = "tests/conformance/test_spmd_model_parallelism.py"
    paths = ["tests/spmd", model_parallelism + ("" if num_devices == 4 else "::" + PARTS)]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths], cwd=ROOT,
                          env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
