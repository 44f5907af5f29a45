"""Picks the backend: XLA where it is asked for, plain PyTorch where it is not."""

from __future__ import annotations

import importlib.util
import os
import sys

from tpuspec.config import CaptureMode, RunConfig
from tpuspec.errors import ConfigError, DeviceError
from tpuspec.runtime.compile_cache import initialize_compile_cache
from tpuspec.runtime.environment import KEEP_BARRIERS
from tpuspec.runtime.native import NativeBackend
from tpuspec.runtime.topology import wanted_devices
from tpuspec.spec.backend import Backend

PJRT_DEVICE = "PJRT_DEVICE"

_reasons: dict[str, str] = {}
"""Why this process chose a platform, for later calls, which find PJRT_DEVICE set."""


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
    if platform == "CPU" and not _is_started():
        _keep_barriers()
        if wanted is not None:
            _make_cpu_devices(wanted)
    # Imported here: torch_xla costs seconds, and reads the environment when its client starts.
    if config.tpu_config.is_spmd:
        from tpuspec.runtime.xla_spmd import XlaSpmd

        initialize_compile_cache(config, platform)
        return XlaSpmd.start(config, platform=platform, reason=reason)
    from tpuspec.runtime.xla_replicas import XlaReplicas

    initialize_compile_cache(config, platform)
    return XlaReplicas.start(config, platform=platform, reason=reason)


def may_span_hosts(config: RunConfig, *, use_tpu: bool) -> bool:
    """Whether other processes may compute with this one, as its settings say; starts nothing.

    A TPU may be part of a pod, which shows when its client has started.
    """
    if config.cluster.num_workers > 1:
        return True
    return use_tpu and importlib.util.find_spec("torch_xla") is not None and choose_platform()[0] != "CPU"


def _is_started() -> bool:
    torch_xla = sys.modules.get("torch_xla")
    return torch_xla is not None and torch_xla._XLAC._xla_runtime_is_initialized()


def _keep_barriers() -> None:
    """Asks XLA:CPU to keep optimization barriers, between the steps of a program, until its operations are fused."""
    flags = os.environ.get("XLA_FLAGS", "")
    if KEEP_BARRIERS not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {KEEP_BARRIERS}".strip()


def _make_cpu_devices(num_devices: int) -> None:
    """Asks the XLA client of this process, which has not started, for that many CPU devices."""
    if num_devices > 1:
        os.environ.setdefault("CPU_NUM_DEVICES", str(num_devices))
        # Each device's part of a collective waits in a thread of its own: a pool as small as the machine would hang.
        for name, threads in {"XLA_THREAD_POOL_SIZE": 64, "NPROC": 32, "PJRT_NPROC": 32}.items():
            os.environ.setdefault(name, str(threads))


def choose_platform() -> tuple[str, str]:
    """Returns the PJRT platform and why it was chosen; sets PJRT_DEVICE where it was unset.

    Raises:
      DeviceError: torch_xla is not installed.
    """
    if importlib.util.find_spec("torch_xla") is None:
        raise DeviceError(
            "use_tpu=True needs torch_xla, which is not installed. Install torch_xla==2.9.0 (Linux), with the extra "
            "tpuspec[tpu] on a TPU host, or run with use_tpu=False.")
    chosen = os.environ.get(PJRT_DEVICE)
    if chosen:
        os.environ[PJRT_DEVICE] = chosen.upper()  # the client knows capitals only
        return chosen.upper(), _reasons.get(chosen, f"{PJRT_DEVICE}={chosen}")
    # Keeps torch_xla from choosing, and from logging that it chose.
    os.environ["PJRT_SELECT_DEFAULT_DEVICE"] = "0"
    try:
        import torch_xla
        from torch_xla._internal import tpu

        num_chips = tpu.num_available_chips() if torch_xla._found_libtpu else 0
    finally:
        del os.environ["PJRT_SELECT_DEFAULT_DEVICE"]
    platform = "TPU" if num_chips else "CPU"
    os.environ[PJRT_DEVICE] = platform
    found = f"libtpu found {num_chips} chips" if num_chips else "no TPU found"
    _reasons[platform] = f"{PJRT_DEVICE} not set, {found}"
    return platform, _reasons[platform]
