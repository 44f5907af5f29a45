"""The hosts of a TPU pod as torch_xla knows them, and the one message that their devices carry."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr

from tpuspec.runtime import graph
from tpuspec.runtime.pod import Pod, join_pod


def find_pod(heartbeat_seconds: float) -> Pod | None:
    """Returns the pod of this process; None where its XLA client has one host.

    Raises:
      DeviceError: as `join_pod`.
    """
    if xr.process_count() == 1:
        return None
    return join_pod(meet_over_devices, host_index=xr.process_index(), num_devices=xr.addressable_device_count(),
                    heartbeat_seconds=heartbeat_seconds)


def meet_over_devices(messages: Sequence[bytes]) -> Sequence[bytes]:
    """Returns the messages of all devices of the pod, by `xm.rendezvous`.

    It is what `xm.mesh_reduce` calls, without its pickle. Every device takes part, and each waits for the others: a
    thread a device. Compiles, and runs on the devices: for once, not for every step.
    """
    devices = [str(device) for device in xm.get_xla_supported_devices()]
    graph.set_replication(graph.all_devices())

    def send(device: str, message: bytes) -> list[bytes]:
        graph.use_device(device)
        return xm.rendezvous("tpuspec", message)

    with ThreadPoolExecutor(len(devices)) as threads:
        received = list(threads.map(send, devices, messages))
    return received[0]
