"""The XLA client of this process: started once, with the devices that the first run asks for."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr

from tpuspec.errors import ConfigError, DeviceError
from tpuspec.runtime.torch_parts import restore_torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """What the client runs on.

    Attributes:
      hardware: 'TPU' or 'CPU'.
      num_devices: devices of this host.
      already_ran: whether it was started before.
      num_hosts: processes with devices.
      host_index: this one among them.
    """

    hardware: str
    num_devices: int
    already_ran: bool
    num_hosts: int
    host_index: int


def start_client(platform: str, *, spmd: bool) -> Client:
    """Starts the XLA client, or joins the one that runs, and checks that it is what the settings ask for.

    Args:
      platform: of PJRT.
      spmd: whether all devices are one logical device, over whose parts XLA splits tensors.

    Raises:
      DeviceError: no device, or the client runs on another platform, with other devices, or in the other mode.
      ConfigError: there are several hosts, which a mesh does not span.
    """
    restore_torch()
    already_ran = torch_xla._XLAC._xla_runtime_is_initialized()
    _check_mode(already_ran, spmd=spmd)
    try:
        if spmd and not xr.is_spmd():
            xr.use_spmd()
        num_devices = xr.addressable_runtime_device_count()
        hardware = xm.xla_device_hw(torch_xla.device(0))
    except (RuntimeError, OSError) as error:  # an OSError where libtpu is missing
        raise DeviceError(
            f"PJRT_DEVICE={platform} cannot be started: {str(error).splitlines()[0].rstrip('.')}. "
            "Set PJRT_DEVICE=CPU to run without an accelerator.") from error
    if already_ran and hardware != platform.split("_")[0]:
        raise DeviceError(
            f"The XLA client of this process already runs on {hardware}; PJRT_DEVICE={platform} came too late. "
            "Set PJRT_DEVICE before the first XLA call of the process.")
    if spmd and xr.process_count() > 1:
        raise ConfigError(
            f"this version of tpuspec spreads a mesh over the XLA devices of one host; {xr.process_count()} hosts were "
            "found. Take a slice of one host, or leave num_cores_per_replica, mesh, sharding and fsdp unset.")
    wanted = int(os.environ.get("CPU_NUM_DEVICES", "1"))
    if hardware == "CPU" and already_ran and wanted != num_devices:
        raise DeviceError(
            f"The XLA client of this process already runs with {num_devices} CPU devices; CPU_NUM_DEVICES="
            f"{wanted} came too late. Set it before the first XLA call of the process.")
    return Client(hardware=hardware, num_devices=num_devices, already_ran=already_ran,
                  num_hosts=xr.process_count(), host_index=xr.process_index())


def _check_mode(already_ran: bool, *, spmd: bool) -> None:
    if spmd and already_ran and not xr.is_spmd():
        raise DeviceError(
            "The XLA client of this process already runs without a mesh, and a process cannot change that. Make the "
            "Trainer with the mesh (or num_cores_per_replica, sharding, fsdp) first, or in a process of its own.")
    if not spmd and xr.is_spmd():
        raise DeviceError(
            "The XLA client of this process runs with a mesh, which an earlier Trainer or XLA_USE_SPMD asked for: its "
            "devices are one logical device. Give this Trainer a mesh too, such as TPUConfig(mesh={'data': n}), or run "
            "it in a process of its own.")
