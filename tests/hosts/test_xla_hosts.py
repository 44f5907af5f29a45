"""The Trainer of two processes on XLA's backend, as the hosts of a pod."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.free_port import free_port
from tests.hosts.conftest import ROOT

pytestmark = pytest.mark.slow

NUM_ROWS, BATCH = 21, 4


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What came of a process alone, and of the chief and the other host of two; host 1 is killed at its end."""
    out, port = tmp_path_factory.mktemp("hosts"), str(free_port())
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "1", "MASTER_ADDR": "127.0.0.1"}
    processes = [subprocess.Popen([sys.executable, str(Path(__file__).parent / "xla_hosts.py"), host, port, str(out)],
                                  env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                  text=True) for host in ("-1", "0", "1")]
    errors = [process.communicate(timeout=400)[1] for process in processes]
    # The chief takes note of the failure, but its run has failed.
    assert [process.returncode for process in processes] == [0, 1, -9], errors
    return [json.loads((out / f"result{host}.json").read_text()) for host in (-1, 0, 1)]


def test_both_hosts_end_with_the_state_of_one(results):
    alone, *hosts = results
    for host in hosts:
        assert host["step"] == 20
        assert host["kind"] == "replay"
        assert np.abs(np.subtract(host["weights"], alone["weights"])).max() < 1e-6
        for kind in ("metrics", "native"):
            assert host[kind] == pytest.approx(alone["metrics"], abs=1e-6)


def test_only_the_chief_has_host_work_predictions_and_files(results):
    alone, chief, other = results
    assert [host["is_chief"] for host in results] == [True, True, False]
    assert chief["num_metric_rows"] == 2 * NUM_ROWS
    assert chief["host_calls"] == [[2 * step, 2 * first] for step, first in alone["host_calls"]]
    assert len(chief["host_calls"]) == 20
    rows = alone["predictions"]
    assert chief["predictions"] == [x for i in range(0, NUM_ROWS, BATCH) for x in 2 * rows[i:i + BATCH]]
    assert set(chief["files"]) == set(alone["files"])
    assert "checkpoint-20" in chief["files"]
    assert (other["num_metric_rows"], other["host_calls"], other["predictions"], other["files"]) == (0, [], [], [])


def test_the_chief_names_the_host_that_was_killed(results):
    assert re.match(r"host 1 of 2 \(.*, pid \d+\) failed in [\w ]+: it ended without a word", results[1]["failure"])
