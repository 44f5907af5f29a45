"""The hosts of a pod meet: threads stand for its devices' collective, and processes for its hosts."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tpuspec.errors import ConfigError, DeviceError
from tpuspec.host.drain import Drain
from tpuspec.host.executor import HostExecutor
from tpuspec.runtime import pod
from tpuspec.runtime.pod import replica_order
from tpuspec.runtime.stacked import StackedStep, only_on_chief
from tpuspec.spec.backend import Topology
from tpuspec.spec.results import Batch, HostFunctions, StepOutput, StepRows

ROOT = Path(__file__).resolve().parent.parent.parent

HOST = """
import json, os, socket, sys
from tpuspec.runtime.pod import join_pod

host, num_hosts, per_host, port, places = json.loads(sys.argv[1])

def meet(messages):
    # The devices' collective: a server brings the messages of all together, in the order of its places.
    with socket.create_connection(("127.0.0.1", port)) as server:
        file = server.makefile("rw")
        file.write(json.dumps([host, [message.decode() for message in messages]]) + "\\n")
        file.flush()
        return [message.encode() for message in json.loads(file.readline())]

pod = join_pod(meet, host_index=host, num_devices=per_host, heartbeat_seconds=20.0)
hosts = pod.coordinator
again = join_pod(lambda messages: 1 / 0, host_index=host, num_devices=per_host, heartbeat_seconds=20.0)
assert again is pod
result = {"order": pod.order, "exchanged": hosts.exchange({"host": host}, name="a value"),
          "agreed": [hosts.agree(host == 1, name="one"), hosts.agree(False, name="none")],
          "shared": hosts.share({"chief": host}), "failed": hosts.any_failed(), "chief": hosts.is_chief}
hosts.barrier("all", 20.0)
print(json.dumps(result))
"""


def meet_on(server: socket.socket, num_hosts: int, places: list[tuple[int, int]]) -> None:
    """Answers each host with the messages of all devices, in the devices' order."""
    with contextlib.ExitStack() as stack:
        files, told = [], {}
        for _ in range(num_hosts):
            connection = stack.enter_context(server.accept()[0])
            files.append(stack.enter_context(connection.makefile("rw")))
            host, messages = json.loads(files[-1].readline())
            told[host] = messages
        for file in files:
            file.write(json.dumps([told[host][number] for host, number in places]) + "\n")
            file.flush()


@pytest.mark.slow
def test_hosts_meet_by_one_message_a_device_and_agree_over_their_network_from_then_on():
    # As a pod numbers its devices: those of a host are no neighbours.
    places = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MASTER_")}
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        hosts = [subprocess.Popen(
            [sys.executable, "-c", HOST, json.dumps([host, 2, 4, port, places])], cwd=ROOT, text=True,
            env=environment | {"PYTHONPATH": str(ROOT)} | ({"MASTER_ADDR": "127.0.0.1"} if host == 0 else {}),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE) for host in range(2)]
        server.settimeout(120)
        meet_on(server, 2, places)
        outputs = [host.communicate(timeout=120) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    for host, (stdout, _) in enumerate(outputs):
        assert json.loads(stdout.splitlines()[-1]) == {
            "order": [0, 1, 4, 5, 2, 3, 6, 7], "exchanged": [{"host": 0}, {"host": 1}], "agreed": [True, False],
            "shared": {"chief": 0}, "failed": False, "chief": host == 0}


@pytest.mark.parametrize(("owners", "order"), [
    ([(0, 0)], (0,)), ([(0, 0), (0, 1), (1, 0), (1, 1)], (0, 1, 2, 3)), ([(1, 0), (0, 0)], (1, 0)),
    ([(0, 1), (1, 0), (0, 0), (1, 1)], (2, 0, 1, 3))])
def test_replicas_are_numbered_host_by_host_wherever_their_devices_stand(owners, order):
    assert replica_order(owners) == order


@pytest.mark.parametrize("owners", [[(0, 0), (0, 1), (1, 0)], [(0, 0), (2, 0)], [(0, 0), (0, 0), (1, 0), (1, 1)]])
def test_hosts_with_different_numbers_of_devices_are_refused(owners):
    with pytest.raises(DeviceError, match="every host of a pod must bring the same number of devices; got"):
        replica_order(owners)


def test_a_port_that_is_none_is_told(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "none")
    with pytest.raises(ConfigError, match="MASTER_PORT must be a number .*got 'none'"):
        pod.join_pod(lambda messages: messages, host_index=0, num_devices=1, heartbeat_seconds=20.0)


def make_outputs(num_replicas: int) -> list[StepOutput]:
    return [StepOutput(tensors={
        "loss": torch.tensor(float(r)), "host_call": {"x": torch.full((2, 3), float(r))},
        "eval_metrics": [torch.arange(2) + 10 * r]}, functions=HostFunctions(host_call=print))
        for r in range(num_replicas)]


def drained(steps: list[list[StepOutput]], *, copies: int = 1):
    """What the worker gets of the outputs of one step."""
    found = []
    with HostExecutor() as executor:
        drain = Drain(lambda tensors: tensors, executor, work=found.append, copies=copies)
        for step in steps:
            drain.submit(1, step, StepRows(mask=torch.ones(6, dtype=torch.bool), num_rows=6))
        drain.flush()
    return found[0]


def stacked(outputs: list[StepOutput]) -> StepOutput:
    """The outputs of all replicas as one replica's step has them: its gather finds those of the others."""
    waiting = [tree_leaves(output.tensors) for output in outputs]
    number = itertools.count()

    def gather(tensor: Tensor) -> Tensor:
        i = next(number)
        assert torch.equal(tensor, waiting[0][i].unsqueeze(0))
        return torch.cat([leaves[i].unsqueeze(0) for leaves in waiting])

    step = StackedStep(step=lambda *_: outputs[0], num_replicas=len(outputs), gather=gather)
    return step(None, None, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("copies", [1, 3])
def test_stacked_tensors_of_all_replicas_reach_the_host_as_each_replicas_own(copies):
    outputs = make_outputs(3)
    plain, joined = drained([outputs], copies=copies), drained([[stacked(outputs)]], copies=copies)
    assert plain.mean_loss() == joined.mean_loss()
    assert torch.equal(plain.join("host_call")["x"], joined.join("host_call")["x"])
    assert torch.equal(plain.join("eval_metrics")[0], joined.join("eval_metrics")[0])


def test_only_the_chief_has_something_to_fetch():
    class Step:
        def __call__(self, batches, micro_step=0):
            return [stacked(make_outputs(2))]

        def publish(self):
            raise KeyError("publish")

    for host in (0, 1):
        step = only_on_chief(Step(), Topology(platform="TPU", devices=(), num_replicas_per_host=1, num_hosts=2,
                                              host_index=host))
        (output,) = step([Batch(features=None)])
        assert bool(output.tensors) is (host == 0)
        assert (output.functions.host_call is print) is (host == 0)
        with pytest.raises(KeyError, match="publish"):
            step.publish()
