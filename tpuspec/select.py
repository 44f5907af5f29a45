"""Picks the backend: XLA where it is asked for, plain PyTorch where it is not."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import torch

from tpuspec.config import CaptureMode, RunConfig
from tpuspec.data.random_state import keeping_random_state
from tpuspec.errors import ConfigError
from tpuspec.hosts.environment import read_local_rank
from tpuspec.hosts.pod import meet
from tpuspec.hosts.process_group import join
from tpuspec.native.backend import NativeBackend
from tpuspec.spec.backend import Backend
from tpuspec.spec.coordinator import Coordinator
from tpuspec.tracer.platforms import PJRT_DEVICE, choose_platform, is_pod, is_started, make_cpu_devices
from tpuspec.tracer.topology import wanted_devices

if TYPE_CHECKING:
    from tpuspec.engine.topologies import TopologyEngines


def select(config: RunConfig, *, use_tpu: bool) -> Backend:
    """Returns the backend for a run; starts the XLA client if it is the first.

    Args:
      config: the settings of the run.
      use_tpu: XLA (TPU, or CPU where there is none) if true, plain PyTorch on CPU or GPU if not.

    Raises:
      DeviceError: torch_xla is missing, no device is found, or a client already runs with other settings.
      ConfigError: the settings do not fit the devices.
    """
    if not use_tpu:
        if config.capture is CaptureMode.require:
            raise ConfigError("capture=require: plain PyTorch (use_tpu=False) captures nothing. Set capture=auto.")
        return NativeBackend.start(config)
    platform, reason = choose_platform()
    num_workers = config.cluster.num_workers
    wanted = wanted_devices(config.tpu_config)
    if platform == "CPU" and wanted is not None and not is_started():
        make_cpu_devices(wanted // max(num_workers, 1), in_all=wanted)
    # Imported here: torch_xla and jax cost seconds, and read the environment when their clients start.
    with keeping_random_state():  # they draw: the first run of a process would have other numbers than the next
        from tpuspec.engine.compile_cache import keep_programs
        from tpuspec.engine.engines import Engines
        from tpuspec.tracer.xla import XlaBackend

    if platform != "CPU":
        os.environ[PJRT_DEVICE] = "CPU"  # torch_xla traces; jax has the accelerator
    keep_programs(config)
    return XlaBackend.start(config, Engines(platform), platform=platform, reason=reason,
                            coordinator=_join_hosts(config, platform))


def select_topology(config: RunConfig, name: str) -> tuple[Backend, TopologyEngines]:
    """Returns a backend that traces, and compiles for a topology of TPU chips that are not there; nothing runs.

    Args:
      config: the settings of the run.
      name: of the topology, such as 'v5e:2x2'.

    Raises:
      ConfigError: there is no such topology, or the settings do not fit it.
      DeviceError: torch_xla or libtpu is missing.
    """
    choose_platform()
    os.environ[PJRT_DEVICE] = "CPU"
    from tpuspec.engine.topologies import TopologyEngines
    from tpuspec.tracer.xla import XlaBackend

    engines = TopologyEngines(name)
    return XlaBackend.start(config.replace(capture=CaptureMode.require), engines, platform="TPU",
                            reason=f"planned, {name}"), engines


def _join_hosts(config: RunConfig, platform: str) -> Coordinator | None:
    """Joins the other hosts: those of torchrun, or of a TPU pod; returns None on one."""
    from tpuspec.engine import hosts

    if config.cluster.num_workers > 1:
        group = join(config, torch.device("cpu"))
        hosts.join_processes(group, group.own_address, read_local_rank() if platform == "CUDA" else None)
    elif is_pod(platform):
        index, num_hosts = hosts.join_pod()
        group = meet(hosts.tell_all, host_index=index, num_hosts=num_hosts, heartbeat_seconds=config.heartbeat_seconds)
    else:
        return None
    hosts.leave_with(group)
    return group


def may_span_hosts(config: RunConfig, *, use_tpu: bool) -> bool:
    """Whether other processes may compute with this one, as its settings say; starts nothing.

    A TPU may be part of a pod, which shows when its client has started.
    """
    if config.cluster.num_workers > 1:
        return True
    return use_tpu and importlib.util.find_spec("torch_xla") is not None and choose_platform()[0] != "CPU"
