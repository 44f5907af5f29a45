"""The devices of a platform, in this process and in those that it has joined, and engines on them."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from tpuspec.engine.devices import OneDevice, Replicas
from tpuspec.engine.mesh import DeviceMesh
from tpuspec.errors import DeviceError


class Engines:
    """The devices of a platform, and engines on them.

    Args:
      platform: of PJRT: 'CPU', 'TPU' or 'CUDA'.
    """

    def __init__(self, platform: str) -> None:
        self._platform = platform
        self._name = {"CPU": "cpu", "TPU": "tpu", "CUDA": "cuda"}.get(platform, platform.lower())

    def num_devices(self) -> int:
        """Starts jax's client, or joins the one that runs, and counts its devices.

        On a CPU it makes as many as CPU_NUM_DEVICES says.

        Raises:
          DeviceError: the platform cannot be started.
        """
        return len(self._devices())

    def make(self, num_replicas: int) -> OneDevice:
        """Returns the engine of so many replicas of each process, a device each.

        Raises:
          DeviceError: there are fewer devices, or the platform cannot be started.
        """
        devices = self._all_devices(num_replicas)
        return OneDevice(devices) if len(devices) == 1 else Replicas(devices)

    def make_mesh(self, axes: Mapping[str, int], parts: Sequence[Sequence[int]] = ()) -> DeviceMesh:
        """Returns the engine of a mesh of devices of all processes, as many of each.

        Args:
          axes: mesh axis -> its size.
          parts: into which the cores of a replica split dims of batches.

        Raises:
          DeviceError: the platform cannot be started.
          ConfigError: as `DeviceMesh`.
        """
        return DeviceMesh(self._all_devices(math.prod(axes.values()) // jax.process_count()), axes, parts)

    def _all_devices(self, num_per_process: int) -> list[Any]:
        """Returns so many devices of each process, those of a process side by side."""
        devices = self._devices()
        if len(devices) < num_per_process:
            raise DeviceError(
                f"jax's client of this process already runs with {len(devices)} {self._platform} devices; "
                f"{num_per_process} are wanted. Set CPU_NUM_DEVICES, or make the Trainer with the most shards, before "
                "the first use of jax in the process.")
        processes: dict[int, list[Any]] = {}
        for device in sorted(jax.devices(self._name), key=lambda device: device.id):
            processes.setdefault(device.process_index, []).append(device)
        return [device for index in sorted(processes) for device in processes[index][:num_per_process]]

    def _devices(self) -> list[Any]:
        if self._name == "cpu":
            with contextlib.suppress(RuntimeError):  # the client runs
                # Else libtpu, where it is installed, looks for chips.
                if not jax.config.jax_platforms:  # type: ignore[attr-defined]  # made when jax is imported
                    jax.config.update("jax_platforms", "cpu")
                jax.config.update("jax_num_cpu_devices", int(os.environ.get("CPU_NUM_DEVICES", "1")))
        try:
            return jax.local_devices(backend=self._name)
        except RuntimeError as error:
            raise DeviceError(
                f"PJRT_DEVICE={self._platform} cannot be started: {str(error).splitlines()[0].rstrip('.')}. "
                "Set PJRT_DEVICE=CPU to run without an accelerator.") from error
