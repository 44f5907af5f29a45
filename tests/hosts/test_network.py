"""Two hosts in two network namespaces, joined by a cable that can be cut."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import damaged_steps
from tpuspec.checkpoint.store import CheckpointStore

pytestmark = [pytest.mark.slow, pytest.mark.hardware]

ROOT = Path(__file__).resolve().parent.parent.parent
HEARTBEAT_SECONDS = 6
ADDRESSES = ("10.231.77.1", "10.231.77.2")


def ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30)


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Names of two namespaces whose ends of one veth pair have ADDRESSES."""
    if shutil.which("ip") is None:
        pytest.skip("there is no ip command")
    names = [f"tpuspec{os.getpid()}{end}" for end in "ab"]
    made = [ip("netns", "add", name) for name in names]
    cable = ip("link", "add", "tpuspec-a", "netns", names[0], "type", "veth", "peer", "name", "tpuspec-b",
               "netns", names[1])
    try:
        refused = [step.stderr.strip() for step in (*made, cable) if step.returncode]
        if refused:
            pytest.skip(f"network namespaces are not permitted here: {refused[0]}")
        for name, end, address in zip(names, "ab", ADDRESSES, strict=True):
            assert ip("-n", name, "addr", "add", f"{address}/24", "dev", f"tpuspec-{end}").returncode == 0
            for link in ("lo", f"tpuspec-{end}"):
                assert ip("-n", name, "link", "set", link, "up").returncode == 0
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def start(namespace: str, rank: int, out: Path, job: str, **options: object) -> subprocess.Popen[str]:
    environment = os.environ | {
        "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29500",
        "PYTHONPATH": str(ROOT)}
    program = [sys.executable, str(Path(__file__).parent / "linear.py"), job, str(out)]
    settings = [f"{name}={value}" for name, value in options.items()]
    return subprocess.Popen(["ip", "netns", "exec", namespace, *program, *settings], env=environment, cwd=ROOT,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_two_hosts_train_and_a_cut_cable_ends_both(namespaces, tmp_path):
    processes = [start(name, rank, tmp_path, "train,evaluate,train", steps=10) for rank, name in enumerate(namespaces)]
    assert [process.communicate(timeout=120)[1] and process.returncode for process in processes] == [0, 0]
    processes = [start(name, rank, tmp_path, "train", steps=10**6, fail="nowhere", save=20, heartbeat=HEARTBEAT_SECONDS)
                 for rank, name in enumerate(namespaces)]
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run0" / "checkpoint-40").exists():
            assert time.monotonic() < deadline
            assert [process.poll() for process in processes] == [None, None]
            time.sleep(0.2)
        assert ip("-n", namespaces[0], "link", "set", "tpuspec-a", "down").returncode == 0
        cut = time.monotonic()
        errors = [process.communicate(timeout=60)[1] for process in processes]
        seconds = time.monotonic() - cut
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 1]
    assert seconds < HEARTBEAT_SECONDS + 10
    for other, error in zip((1, 0), errors, strict=True):
        assert f"host {other} of 2" in error
        assert "it has been silent for" in error
    store = CheckpointStore(tmp_path / "run0")
    assert max(store.steps()) >= 40
    assert damaged_steps(store) == []
