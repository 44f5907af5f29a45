"""Hosts of a pod, which their devices have joined, meet over their network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from tests.free_port import free_port
from tests.hosts.conftest import ROOT
from tpuspec.errors import ConfigError, DeviceError
from tpuspec.hosts import pod

HOST = """
import json, os, sys
from datetime import timedelta
import torch.distributed as dist
from tpuspec.hosts.launch_info import launch_info
from tpuspec.hosts.pod import meet
host, port = int(sys.argv[1]), int(sys.argv[2])
store = dist.TCPStore("127.0.0.1", port, 2, is_master=host == 0, timeout=timedelta(seconds=60))
def tell_all(message):
    if host == 0:
        store.set("message", message)
    return store.get("message")
group = meet(tell_all, host_index=host, num_hosts=2, heartbeat_seconds=20.0)
assert meet(lambda message: 1 / 0, host_index=host, num_hosts=2, heartbeat_seconds=20.0) is group
info = launch_info()
print(json.dumps([group.exchange(host, name="who"), info.launcher, info.host_index, info.num_hosts]), flush=True)
group.barrier("end", 30.0)
"""


def test_hosts_meet_over_the_address_that_their_devices_carry():
    port = str(free_port())
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1"}
    hosts = [subprocess.Popen([sys.executable, "-c", HOST, str(host), port], env=environment, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) for host in range(2)]
    ends = [host.communicate(timeout=120) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], ends
    assert [json.loads(out.splitlines()[-1]) for out, _ in ends] == [[[0, 1], "pod", host, 2] for host in range(2)]


def test_a_port_that_is_none_is_told(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "many")
    with pytest.raises(ConfigError, match="MASTER_PORT must be a number"):
        pod.meet(lambda message: message, host_index=0, num_hosts=2, heartbeat_seconds=20.0)


def test_a_chief_that_cannot_be_reached_is_told_with_its_address(monkeypatch):
    monkeypatch.setattr(pod, "JOIN_SECONDS", 1.0)
    port = free_port()
    begun = time.monotonic()
    with pytest.raises(DeviceError, match=rf"host 1 of 2 cannot reach the first one at 127.0.0.1:{port}"):
        pod.meet(lambda message: json.dumps(["127.0.0.1", port]).encode(), host_index=1, num_hosts=2,
                 heartbeat_seconds=20.0)
    assert time.monotonic() - begun < 60
