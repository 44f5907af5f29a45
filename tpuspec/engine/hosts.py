"""Joins jax's runtime in this process with that in others, so that programs run on the devices of all."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax._src.lib import _jax
from jax.experimental import multihost_utils

from tpuspec.errors import DeviceError
from tpuspec.spec.coordinator import Coordinator

JOIN_SECONDS = 300
_LEAVE_SECONDS = 10
# Our own coordinator tells failures, sooner and with their cause; jax would end the process without one.
_SILENCE_SECONDS = 12 * 3600


def join_processes(coordinator: Coordinator, address: str, local_device: int | None) -> None:
    """Joins processes that know one another already.

    Args:
      coordinator: of them.
      address: by which the others reach this machine.
      local_device: the GPU of this process; None for all devices.

    Raises:
      DeviceError: jax has started its client before, or the others cannot be reached.
    """
    if jax.distributed.is_initialized():
        return
    with socket.socket() as probe:  # jax takes no port 0
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    chief = coordinator.exchange(f"{address}:{port}" if coordinator.is_chief else None, name="jax's address")[0]
    with _told(f"process {coordinator.host_index} of {coordinator.num_hosts}"), _without_proxies(), _served_apart():
        jax.distributed.initialize(
            chief, coordinator.num_hosts, coordinator.host_index, local_device_ids=local_device,
            initialization_timeout=JOIN_SECONDS, heartbeat_timeout_seconds=_SILENCE_SECONDS,
            shutdown_timeout_seconds=_LEAVE_SECONDS, cluster_detection_method="deactivate")


def join_pod() -> tuple[int, int]:
    """Joins the hosts of a TPU pod, which jax finds by itself.

    Returns:
      The number of this host, and how many there are.

    Raises:
      DeviceError: as `join_processes`.
    """
    if not jax.distributed.is_initialized():
        with _told("this host of the pod"), _without_proxies(), _served_apart():
            jax.distributed.initialize(
                initialization_timeout=JOIN_SECONDS, heartbeat_timeout_seconds=_SILENCE_SECONDS,
                shutdown_timeout_seconds=_LEAVE_SECONDS)
    return jax.process_index(), jax.process_count()


def tell_all(message: bytes) -> bytes:
    """Returns the message of the first host on every host, by their devices; all of them call it."""
    room = np.zeros(512, np.uint8)
    room[:len(message)] = list(message)
    return bytes(multihost_utils.broadcast_one_to_all(room)).rstrip(b"\0")


@contextlib.contextmanager
def _told(who: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise DeviceError(f"{who} cannot join the others: {str(error).splitlines()[0].rstrip('.')}. Make the Trainer "
                          "before the first use of jax in the process, and let the hosts reach one another.") from error


class _Service:
    """The coordination service in a process of its own, which outlives this one if it is killed."""

    def __init__(self, address: str, num_processes: int, **_: object) -> None:
        command = [sys.executable, str(Path(__file__).with_name("rendezvous.py")), address, str(num_processes),
                   str(_SILENCE_SECONDS), str(_LEAVE_SECONDS)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                         start_new_session=True)  # which no Ctrl-C of this one reaches
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError(f"the service at {address} did not start")

    def shutdown(self) -> None:
        """Ends it; the others have left."""
        with contextlib.suppress(subprocess.TimeoutExpired, OSError):
            self._process.communicate("bye", timeout=_LEAVE_SECONDS)


@contextlib.contextmanager
def _served_apart() -> Iterator[None]:
    """Lets jax, which joins others within the block, have its service in a process of its own.

    jax aborts every process whose service is gone, and its own is in the first one; there is no public setting.
    """
    serve, connect = _jax.get_distributed_runtime_service, _jax.get_distributed_runtime_client
    _jax.get_distributed_runtime_service = _Service
    _jax.get_distributed_runtime_client = functools.partial(connect, shutdown_on_destruction=False)
    try:
        yield
    finally:
        _jax.get_distributed_runtime_service, _jax.get_distributed_runtime_client = serve, connect


def leave_with(coordinator: Coordinator) -> None:
    """Lets this process end without waiting for the others, where one of them has failed."""
    def leave() -> None:
        if coordinator.any_failed():
            atexit.unregister(jax.distributed.shutdown)

    atexit.register(leave)  # runs before jax's own, which waits


@contextlib.contextmanager
def _without_proxies() -> Iterator[None]:
    """The hosts reach one another without the proxies of the environment, at which jax's service would hang."""
    kept = {name: os.environ.pop(name) for name in list(os.environ) if name.lower() in ("http_proxy", "https_proxy")}
    try:
        yield
    finally:
        os.environ.update(kept)
