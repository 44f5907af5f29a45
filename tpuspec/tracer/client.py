"""torch_xla's client in this process, on the CPU: steps are traced there, and run elsewhere."""

from __future__ import annotations

import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr

from tpuspec.errors import DeviceError
from tpuspec.tracer.torch_parts import restore_torch


def start_client() -> None:
    """Starts the client, or joins the one that runs.

    Raises:
      DeviceError: the client runs on another platform, or in torch_xla's SPMD mode.
    """
    restore_torch()
    if xr.is_spmd():
        raise DeviceError("torch_xla is in SPMD mode (XLA_USE_SPMD, or xr.use_spmd()) in this process. Leave that out: "
                          "TPUConfig(mesh={'data': n}) says how tensors are split.")
    if (hardware := xm.xla_device_hw(torch_xla.device(0))) != "CPU":
        raise DeviceError(
            f"torch_xla's client of this process already runs on {hardware}, and tpuspec traces steps on the CPU. Make "
            "the Trainer before the first XLA call of the process.")
