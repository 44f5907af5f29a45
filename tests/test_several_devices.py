"""Runs the tests that need several devices in processes whose XLA clients have so many; one at a time, on few cores."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODEL_PARALLELISM = "tests/conformance/test_spmd_model_parallelism.py"


def run(*paths, **settings):
    """Runs tests in a process with these environment variables."""
    environment = {name: value for name, value in os.environ.items() if name != "CPU_NUM_DEVICES"} | settings
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths], cwd=ROOT,
                          env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.minutes
@pytest.mark.slow
def test_the_tests_of_several_replicas_pass():
    run("tests/replicas", CPU_NUM_DEVICES="8")


@pytest.mark.minutes
@pytest.mark.slow
def test_the_tests_of_a_mesh_pass():
    run("tests/spmd", MODEL_PARALLELISM, SPMD_DEVICES="8")
