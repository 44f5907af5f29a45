"""Joins the processes of a run over their network: rendezvous, groups, health; once a process."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tpuspec.config import RunConfig
from tpuspec.errors import ConfigError, DeviceError, HostFailureError
from tpuspec.hosts.collectives import Collectives
from tpuspec.hosts.environment import read_first_address
from tpuspec.hosts.health import Health
from tpuspec.spec.phase import phase_of

T = TypeVar("T")

JOIN_SECONDS = 300.0
# Longer than any wait that is no failure, such as for a chief that writes a checkpoint: health tells failures.
_COLLECTIVE_TIMEOUT = timedelta(hours=12)
_LEAVE_SECONDS = 5.0

_joined: list[NetworkCoordinator] = []


class NetworkCoordinator:
    """Processes that reach one another by sockets; see `tpuspec.spec.coordinator.Coordinator`."""

    def __init__(self, collectives: Collectives, health: Health, store: dist.Store) -> None:
        self.collectives = collectives
        self.num_hosts, self.host_index = collectives.num_hosts, collectives.host_index
        self.is_chief = self.host_index == 0
        self._health = health
        self._store = store
        self._num_barriers: dict[str, int] = {}

    @property
    def own_address(self) -> str:
        """By which the others reach this host."""
        return self._health.own_address

    def exchange(self, value: Any, *, name: str) -> list[Any]:
        return self.collectives.exchange(value, name)

    def agree(self, flag: bool, *, name: str) -> bool:
        return any(self.collectives.exchange(bool(flag), name))

    def barrier(self, name: str, timeout_seconds: float) -> None:
        number = self._num_barriers[name] = self._num_barriers.get(name, 0) + 1
        keys = [f"barrier/{name}/{number}/{host}" for host in range(self.num_hosts)]
        self._store.set(keys[self.host_index], "here")
        deadline = time.monotonic() + timeout_seconds
        while not self._store.check(keys):
            self._health.check()
            if time.monotonic() > deadline:
                missing = [host for host, key in enumerate(keys) if not self._store.check([key])]
                raise HostFailureError(f"hosts {missing} are not at barrier {name!r} after {timeout_seconds:g} s.")
            time.sleep(0.02)

    def any_failed(self) -> bool:
        return self._health.has_failed

    def report(self, error: BaseException, phase: str) -> None:
        if not isinstance(error, HostFailureError):
            text = (str(error).splitlines() or [""])[0]
            self._health.report(phase_of(error, phase), f"{type(error).__name__}: {text}")

    def post(self, name: str, text: str) -> None:
        with _store_reached():
            self._store.set(f"post/{name}", text)

    def read_post(self, name: str, *, remove: bool = False) -> str | None:
        with _store_reached():
            if not self._store.check([key := f"post/{name}"]):
                return None
            text = self._store.get(key).decode()
            if remove:
                self._store.delete_key(key)
        return text

    def share(self, tree: T) -> T:
        return self.collectives.share(tree)

    def collect(self, tree: T) -> list[T] | None:
        return self.collectives.collect(tree)

    def deal(self, trees: Sequence[T] | None) -> T:
        return self.collectives.deal(trees)

    @property
    def is_first_failed(self) -> bool:
        """Whether this host is the one that failed first."""
        failure = self._health.failure
        return failure is not None and failure.host == self.host_index

    def close(self) -> None:
        """Says goodbye to the others."""
        self._health.close()


def _of_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


@contextlib.contextmanager
def _store_reached() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise HostFailureError(f"the first host does not answer: {str(error).splitlines()[0]}") from error


def join(config: RunConfig, device: torch.device) -> NetworkCoordinator:
    """Joins the run's other processes, or returns the group that this process is in already.

    Raises:
      ConfigError: the environment says too little, or another process has the same RANK.
      DeviceError: some processes do not come, or cannot be reached.
    """
    if _joined:
        return _joined[0]
    cluster = config.cluster
    rank, world = cluster.task_index, cluster.num_workers
    address = read_first_address(world)
    try:
        # Not of RANK and its like where srun started this; torchrun may have the store in a process of its own.
        where = "env://" if "RANK" in os.environ else f"tcp://{_of_url(address[0])}:{address[1]}"
        store, _, _ = next(dist.rendezvous(where, rank, world, timeout=timedelta(seconds=JOIN_SECONDS)))
    except (RuntimeError, ValueError) as error:
        raise DeviceError(f"process {rank} of {world} cannot reach the first one at {address[0]}:{address[1]}: "
                          f"{str(error).splitlines()[0]}") from error
    return connect(store, rank, world, address=address, heartbeat_seconds=config.heartbeat_seconds,
                   on_gpu=device.type == "cuda")


def joined() -> NetworkCoordinator | None:
    """Returns the group that this process is in; None alone."""
    return _joined[0] if _joined else None


def connect(store: dist.Store, rank: int, world: int, *, address: tuple[str, int], heartbeat_seconds: float,
            on_gpu: bool = False) -> NetworkCoordinator:
    """Connects processes that share a store; this process is in their group from then on.

    Args:
      store: of all of them.
      rank: this process.
      world: all of them.
      address: where the first process's store is reached.
      heartbeat_seconds: silence after which a process has failed.
      on_gpu: whether collectives run on GPUs too.

    Raises:
      ConfigError: another process has the same rank.
      DeviceError: some processes do not come, or cannot be reached.
    """
    own = dist.PrefixStore("tpuspec", store)
    _check_all_here(own, rank, world)
    health = _start_health(own, rank, world, heartbeat_seconds, address)
    try:
        # Groups of our own: torch's default group stays the user's, and torchmetrics, which would bring metrics of the
        # chief's host half together over it, finds none.
        control = _gloo(dist.PrefixStore("gloo", own), rank, world, health.own_address)
        on_device = _nccl(dist.PrefixStore("nccl", own), rank, world) if on_gpu else None
    except RuntimeError as error:
        raise DeviceError(f"process {rank} of {world} cannot connect to the others: "
                          f"{str(error).splitlines()[0]}") from error
    coordinator = NetworkCoordinator(
        Collectives(host_index=rank, num_hosts=world, health=health, control=control, device_group=on_device),
        health, own)
    _joined.append(coordinator)
    atexit.register(_leave, coordinator)
    return coordinator


def _gloo(store: dist.Store, rank: int, world: int, address: str) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = _COLLECTIVE_TIMEOUT
    # By the network on which the chief was reached: gloo's own guess, the address of the host's name, is often
    # loopback's.
    options._devices = [gloo.create_default_device() if os.environ.get("GLOO_SOCKET_IFNAME") else
                        gloo.create_device(hostname=address)]
    return gloo(store, rank, world, options)


def _nccl(store: dist.Store, rank: int, world: int) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _COLLECTIVE_TIMEOUT
    return dist.ProcessGroupNCCL(store, rank, world, options)


def _check_all_here(store: dist.Store, rank: int, world: int) -> None:
    if store.add(f"claim/{rank}", 1) > 1:
        raise ConfigError(f"RANK={rank} was taken by another process of this run. Give each its own, 0 .. {world - 1}.")
    keys = [f"claim/{other}" for other in range(world)]
    deadline = time.monotonic() + JOIN_SECONDS
    while not store.check(keys):
        if time.monotonic() > deadline:
            absent = [other for other, key in enumerate(keys) if not store.check([key])]
            raise DeviceError(f"WORLD_SIZE={world}, and the processes of RANK {absent} did not come within "
                              f"{JOIN_SECONDS:g} s.")
        time.sleep(0.05)


def _start_health(store: dist.Store, rank: int, world: int, heartbeat_seconds: float,
                  address: tuple[str, int]) -> Health:
    if rank == 0:
        # The address by which this machine reaches the rendezvous is one by which the others reach it.
        with socket.create_connection(address, 30.0) as probe:
            family, own = probe.family, probe.getsockname()[0]
        listener = socket.create_server((own, 0), family=family, backlog=world)
        token = secrets.token_hex(16)
        store.set("health", json.dumps([own, listener.getsockname()[1], token]))
        return Health(host_index=0, num_hosts=world, heartbeat_seconds=heartbeat_seconds, token=token,
                      listener=listener)
    host, port, token = json.loads(store.get("health"))
    try:
        chief = socket.create_connection((host, port), 30.0)
    except OSError as error:
        raise DeviceError(f"process {rank} of {world} cannot reach the first one at {host}:{port}: {error}") from error
    return Health(host_index=rank, num_hosts=world, heartbeat_seconds=heartbeat_seconds, token=token, chief=chief)


def _leave(coordinator: NetworkCoordinator) -> None:
    failed = coordinator.any_failed()
    if not failed:
        with contextlib.suppress(HostFailureError, RuntimeError):
            coordinator.barrier("leave", _LEAVE_SECONDS)
    coordinator.close()
    if failed and not coordinator.is_first_failed:
        # gloo's own threads may wait for a host that is stopped, and torch would wait for them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
