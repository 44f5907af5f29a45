"""Picks the backend: XLA where it is asked for, plain PyTorch where it is not."""

from __future__ import annotations

import importlib.util
import os

from tpuspec.config import CaptureMode, RunConfig
from tpuspec.errors import ConfigError
from tpuspec.runtime.compile_cache import initialize_compile_cache
from tpuspec.runtime.native import NativeBackend
from tpuspec.runtime.platforms import PJRT_DEVICE, choose_platform, is_pod, is_started, make_cpu_devices
from tpuspec.runtime.topology import wanted_devices
from tpuspec.spec.backend import Backend


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
    num_workers = config.cluster.num_workers
    if num_workers > 1:
        raise ConfigError(
            "torchrun's processes compute together with use_tpu=False (device=cpu or cuda); got "
            f"WORLD_SIZE={num_workers} and use_tpu=True. "
            "XLA finds the hosts of a TPU pod itself: start one process a host, without torchrun.")
    if config.tpu_config.is_spmd:
        # XLA warns at each program that its partitioner will give way to another one.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    platform, reason = choose_platform()
    wanted = wanted_devices(config.tpu_config)
    if platform == "CPU" and wanted is not None and not is_started():
        make_cpu_devices(wanted)
    if config.tpu_config.is_spmd and platform == "CUDA":
        raise ConfigError("a mesh runs on torch_xla's own runtime, which has no GPUs. Leave mesh, sharding, fsdp and "
                          "num_cores_per_replica unset on a GPU, or set PJRT_DEVICE=CPU.")
    # Imported here: torch_xla and jax cost seconds, and read the environment when their clients start.
    if config.tpu_config.is_spmd:
        from tpuspec.runtime.xla_spmd import XlaSpmd

        initialize_compile_cache(config, platform)
        return XlaSpmd.start(config, platform=platform, reason=reason)
    from tpuspec.runtime.xla_replicas import XlaReplicas

    if is_pod(platform):
        initialize_compile_cache(config, platform)
        return XlaReplicas.start(config, platform=platform, reason=reason, engines=None)
    from tpuspec.engine.compile_cache import keep_programs
    from tpuspec.engine.devices import Engines

    if platform != "CPU":
        os.environ[PJRT_DEVICE] = "CPU"  # torch_xla traces; jax has the accelerator
    keep_programs(config)
    return XlaReplicas.start(config, platform=platform, reason=reason, engines=Engines(platform))


def may_span_hosts(config: RunConfig, *, use_tpu: bool) -> bool:
    """Whether other processes may compute with this one, as its settings say; starts nothing.

    A TPU may be part of a pod, which shows when its client has started.
    """
    if config.cluster.num_workers > 1:
        return True
    return use_tpu and importlib.util.find_spec("torch_xla") is not None and choose_platform()[0] != "CPU"
