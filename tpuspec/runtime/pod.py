"""Joins the hosts of a TPU pod: they find one another over their devices, and meet over their network."""

from __future__ import annotations

import json
import os
import socket
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from tpuspec.errors import DeviceError
from tpuspec.runtime.environment import parse_port
from tpuspec.runtime.process_group import JOIN_SECONDS, connect
from tpuspec.spec.coordinator import Coordinator

Meet = Callable[[Sequence[bytes]], Sequence[bytes]]
"""meet(a message of each local device) -> the messages of all devices of all hosts, in the order of collectives."""

_met: list[Pod] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """Hosts that have met.

    Attributes:
      coordinator: what they decide together.
      order: for each replica, host by host, its place among all devices as collectives order them; the devices of a
        host need not be neighbours there.
    """

    coordinator: Coordinator
    order: tuple[int, ...]


def join_pod(meet: Meet, *, host_index: int, num_devices: int, heartbeat_seconds: float) -> Pod:
    """Joins the pod's other hosts, or returns the pod that this process is in already.

    The devices carry one message each, once: which host they belong to, and where the first host is reached. From then
    on the hosts use their network, which needs no device, and tells when a host has failed. Where the first host has
    MASTER_ADDR and MASTER_PORT, those say where it is reached.

    Args:
      meet: brings the messages of all devices together.
      host_index: this host, 0 for the chief.
      num_devices: of this host; all have the same number.
      heartbeat_seconds: silence after which a host has failed.

    Raises:
      ConfigError: MASTER_PORT is no port.
      DeviceError: the hosts are not what they should be, or cannot reach one another.
    """
    if _met:
        return _met[0]
    store, address = _open_store() if host_index == 0 else (None, None)
    messages = meet([json.dumps([host_index, number, address]).encode() for number in range(num_devices)])
    told = [json.loads(message) for message in messages]
    order = replica_order([(host, number) for host, number, _ in told])
    num_hosts = len(told) // num_devices
    chief = next(address for host, _, address in told if host == 0)
    if store is None:
        try:
            store = dist.TCPStore(*chief, is_master=False, timeout=timedelta(seconds=JOIN_SECONDS))
        except (RuntimeError, ValueError) as error:
            raise DeviceError(
                f"host {host_index} of {num_hosts} cannot reach the first one at {chief[0]}:{chief[1]}: "
                f"{str(error).splitlines()[0]}. Open that port between the hosts, or set MASTER_ADDR and MASTER_PORT "
                "on the first one to where the others reach it.") from error
    pod = Pod(order=order, coordinator=connect(
        store, host_index, num_hosts, address=(chief[0], chief[1]), heartbeat_seconds=heartbeat_seconds))
    _met.append(pod)
    return pod


def replica_order(owners: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Returns for each replica, host by host, its place among all devices.

    Args:
      owners: (host, number on that host) of each device.

    Raises:
      DeviceError: hosts have different numbers of devices, or do not number them 0, 1, 2 ...
    """
    devices: dict[int, list[int]] = defaultdict(list)
    for host, number in sorted(owners):
        devices[host].append(number)
    size = len(owners) // len(devices)
    if sorted(devices) != list(range(len(devices))) or any(
            numbers != list(range(size)) for numbers in devices.values()):
        found = {host: len(numbers) for host, numbers in sorted(devices.items())}
        raise DeviceError(f"every host of a pod must bring the same number of devices; got, by host, {found}.")
    place = {owner: i for i, owner in enumerate(owners)}
    return tuple(place[owner] for owner in sorted(owners))


def _open_store() -> tuple[Any, tuple[str, int]]:
    host, port = os.environ.get("MASTER_ADDR") or _own_address(), parse_port(os.environ.get("MASTER_PORT") or "0")
    try:
        store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False,
                              timeout=timedelta(seconds=JOIN_SECONDS))
    except (RuntimeError, ValueError) as error:
        raise DeviceError(f"the first host cannot listen at MASTER_ADDR={host}, MASTER_PORT={port}: "
                          f"{str(error).splitlines()[0]}") from error
    return store, (host, store.port)


def _own_address() -> str:
    """Returns the address of this machine on the network that its default route belongs to."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # reserved for documentation; nothing is sent
        except OSError:
            return socket.gethostbyname(socket.gethostname())
        return probe.getsockname()[0]
