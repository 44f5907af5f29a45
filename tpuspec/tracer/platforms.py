"""Which PJRT platform this process computes on, and what its clients must find in the environment before they start."""

from __future__ import annotations

import importlib.util
import os
import sys

from tpuspec.errors import DeviceError

PJRT_DEVICE = "PJRT_DEVICE"

_chosen: list[tuple[str, str]] = []
"""The platform of this process and why, where PJRT_DEVICE says another one by now: torch_xla traces on the CPU."""


def is_started() -> bool:
    """Whether torch_xla's client runs."""
    torch_xla = sys.modules.get("torch_xla")
    return torch_xla is not None and torch_xla._XLAC._xla_runtime_is_initialized()


def make_cpu_devices(num_devices: int, *, in_all: int) -> None:
    """Asks the XLA client of this process, which has not started, for that many CPU devices.

    Args:
      num_devices: of this process.
      in_all: of all processes, which compute together.
    """
    if in_all > 1:
        os.environ.setdefault("CPU_NUM_DEVICES", str(max(num_devices, 1)))
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
    if chosen and not (chosen == "CPU" and _chosen):
        os.environ[PJRT_DEVICE] = chosen.upper()  # the client knows capitals only
        _chosen[:] = [(chosen.upper(), f"{PJRT_DEVICE}={chosen}")] if chosen.upper() != "CPU" else []
        return chosen.upper(), f"{PJRT_DEVICE}={chosen}"
    if not _chosen:
        _chosen.append(_find_platform())
        os.environ[PJRT_DEVICE] = _chosen[0][0]
    return _chosen[0]


def _find_platform() -> tuple[str, str]:
    # Keeps torch_xla from choosing, and from logging that it chose.
    os.environ["PJRT_SELECT_DEFAULT_DEVICE"] = "0"
    try:
        import torch_xla
        from torch_xla._internal import tpu

        num_chips = tpu.num_available_chips() if torch_xla._found_libtpu else 0
    finally:
        del os.environ["PJRT_SELECT_DEFAULT_DEVICE"]
    if num_chips:
        return "TPU", f"{PJRT_DEVICE} not set, libtpu found {num_chips} chips"
    if any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        import torch

        if torch.cuda.is_available():
            return "CUDA", f"{PJRT_DEVICE} not set, jax has its plugin for CUDA, and there is a GPU"
    return "CPU", f"{PJRT_DEVICE} not set, no TPU found, nor a GPU with jax's plugin for it"


def is_pod(platform: str) -> bool:
    """Whether this host is one of several of a TPU pod."""
    if platform != "TPU":
        return False
    from torch_xla._internal import tpu

    return tpu.num_available_chips() > 0 and len(tpu.get_worker_ips()) > 1
