"""Lets the hosts of a TPU pod, which have joined over their devices, meet over their network as well."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from tpuspec.errors import DeviceError
from tpuspec.hosts.environment import parse_port
from tpuspec.hosts.process_group import JOIN_SECONDS, NetworkCoordinator, connect, joined


def meet(tell_all: Callable[[bytes], bytes], *, host_index: int, num_hosts: int, heartbeat_seconds: float,
         ) -> NetworkCoordinator:
    """Joins the pod's other hosts, or returns the group that this process is in already.

    The devices carry one message, once: where the first host is reached. From then on the hosts use their network,
    which needs no device, and tells when a host has failed. Where the first host has MASTER_ADDR and MASTER_PORT, those
    say where it is reached.

    Args:
      tell_all: returns the first host's message on every host.
      host_index: this host, 0 for the chief.
      num_hosts: all of them.
      heartbeat_seconds: silence after which a host has failed.

    Raises:
      ConfigError: MASTER_PORT is no port.
      DeviceError: the hosts cannot reach one another.
    """
    if (group := joined()) is not None:
        return group
    store, address = _open_store() if host_index == 0 else (None, None)
    host, port = json.loads(tell_all(json.dumps(address).encode()))
    if store is None:
        try:
            store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=JOIN_SECONDS))
        except (RuntimeError, ValueError) as error:
            raise DeviceError(
                f"host {host_index} of {num_hosts} cannot reach the first one at {host}:{port}: "
                f"{str(error).splitlines()[0]}. Open that port between the hosts, or set MASTER_ADDR and MASTER_PORT "
                "on the first one to where the others reach it.") from error
    return connect(store, host_index, num_hosts, address=(host, port), heartbeat_seconds=heartbeat_seconds)


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
