"""XLA, data parallel: one replica per local device, all driven by one Python thread.

This version drives one device, and traces each step anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tpuspec.config import RunConfig
from tpuspec.errors import ConfigError, DeviceError
from tpuspec.runtime.alone import Alone
from tpuspec.runtime.placement import module_as_before, move_module
from tpuspec.runtime.topology import count_replicas
from tpuspec.spec.backend import CompiledStep, Replica, RngState, StepFunction, Topology
from tpuspec.spec.results import Batch, StepOutput
from tpuspec.spec.train_op import reduce_with

T = TypeVar("T")


class XlaReplicas:
    """The XLA devices of this host as replicas; see `spec.backend.Backend` for the verbs."""

    static_shapes = True
    step_kind = "traced"
    coordinator = Alone()

    def __init__(self, devices: Sequence[torch.device], topology: Topology) -> None:
        self._devices = tuple(devices)
        self.topology = topology

    @classmethod
    def start(cls, config: RunConfig, *, platform: str, reason: str) -> XlaReplicas:
        """Starts the XLA client, or joins the one that runs, and checks that it is what the settings ask for.

        Raises:
          DeviceError: no device, or the client runs on another platform or with other devices.
          ConfigError: num_shards or num_cores_per_replica do not fit the devices.
        """
        already_runs = torch_xla._XLAC._xla_runtime_is_initialized()
        try:
            num_devices = xr.addressable_device_count()
            hardware = xm.xla_device_hw(torch_xla.device(0))
        except (RuntimeError, OSError) as error:  # an OSError where libtpu is missing
            raise DeviceError(
                f"PJRT_DEVICE={platform} cannot be started: {str(error).splitlines()[0].rstrip('.')}. "
                "Set PJRT_DEVICE=CPU to run without an accelerator.") from error
        if already_runs and hardware != platform.split("_")[0]:
            raise DeviceError(
                f"The XLA client of this process already runs on {hardware}; PJRT_DEVICE={platform} came too late. "
                "Set PJRT_DEVICE before the first XLA call of the process.")
        shards = config.tpu_config.num_shards
        if hardware == "CPU" and already_runs and _wanted_cpu_devices() != num_devices:
            raise DeviceError(
                f"The XLA client of this process already runs with {num_devices} CPU devices; CPU_NUM_DEVICES="
                f"{_wanted_cpu_devices()} came too late. Set it before the first XLA call of the process.")
        num_replicas = count_replicas(config.tpu_config, num_devices=num_devices, num_devices_per_host=num_devices)
        if (config.tpu_config.num_cores_per_replica or 1) > 1 or config.tpu_config.input_partition_dims is not None:
            raise ConfigError("this version of tpuspec keeps each replica on one device. Leave num_cores_per_replica "
                              "and input_partition_dims None.")
        if num_replicas > 1:
            raise ConfigError(
                f"this version of tpuspec drives one device; {num_devices} were found and num_shards={shards}. "
                "Set TPUConfig(num_shards=1)" + (" or CPU_NUM_DEVICES=1." if hardware == "CPU" else "."))
        devices = [torch_xla.device(i) for i in range(num_replicas)]
        names = tuple(f"{hardware}:{i}" for i in range(num_replicas))
        return cls(devices, Topology(
            platform=hardware, devices=names, num_replicas_per_host=num_replicas, reason=reason))

    def place(self, model: nn.Module | None) -> list[Replica]:
        """Moves the module to the device."""
        device = self._devices[0]
        if model is not None:
            move_module(model, device)
        replica = Replica(ordinal=0, device=device, model=model,
                          global_step=torch.zeros(1, dtype=torch.int64).to(device))
        torch_xla.sync(wait=True)
        return [replica]

    def seed(self, seed: int) -> None:
        """Seeds torch on the host and the random state of each device."""
        torch.manual_seed(seed)
        for device in self._devices:
            xm.set_rng_state(seed, str(device))

    def rng_state(self) -> RngState:
        """Reads torch's random state on the host and the seed of each device."""
        return RngState(host=torch.get_rng_state(),
                        devices=tuple(xm.get_rng_state(str(device)) for device in self._devices))

    def set_rng_state(self, state: RngState) -> None:
        """Puts the random state of host and devices back."""
        torch.set_rng_state(state.host)
        for device, seed in zip(self._devices, state.devices, strict=True):
            xm.set_rng_state(seed, str(device))

    def feed(self, batches: Sequence[Batch]) -> list[Batch]:
        """Sends each replica's tensors in one call."""
        return [self._send(batch, device) for batch, device in zip(batches, self._devices, strict=True)]

    def _send(self, batch: Batch, device: torch.device) -> Batch:
        tensors: list[Tensor] = []
        batch.map(tensors.append)
        sent = iter(torch_xla._XLAC._xla_tensors_from_aten(tensors, [str(device)] * len(tensors), None))
        return batch.map(lambda _: next(sent))

    def compile_step(self, step: StepFunction, replicas: Sequence[Replica]) -> CompiledStep:
        """Wraps the step; XLA compiles it when it first runs."""
        return TracedStep(backend=self, step=step, replicas=tuple(replicas))

    def rehearse(self, replica: Replica, fn: Callable[[], T]) -> T:
        """Traces `fn`; nothing is compiled, and buffers and random state are put back."""
        random_state = self.rng_state()
        try:
            with module_as_before(replica.model):
                return fn()
        finally:
            self.set_rng_state(random_state)
            if replica.model is not None and (buffers := list(replica.model.buffers())):
                # Makes the written-back buffers plain device data: the first step's graph is then that of all others.
                torch_xla._XLAC._xla_sync_multi(buffers, [str(replica.device)], False, True)

    def fetch(self, tree: T) -> T:
        """Copies every XLA tensor of the structure to the host in one transfer."""
        leaves, structure = pytree.tree_flatten(tree)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.device.type == "xla"]
        fetched = torch_xla._XLAC._xla_get_cpu_tensors([leaves[i].detach() for i in places]) if places else []
        for i, tensor in zip(places, fetched, strict=True):
            leaves[i] = tensor
        return pytree.tree_unflatten(leaves, structure)

    def reduce_gradients(self, optimizer: torch.optim.Optimizer, reduction: str) -> None:
        """Reduces and applies the gradients; with one replica mean and sum are one."""
        xm.optimizer_step(optimizer)

    def gather(self, tensor: Tensor) -> Tensor:
        """Returns the tensor of the one replica."""
        return tensor


def _wanted_cpu_devices() -> int:
    return int(os.environ.get("CPU_NUM_DEVICES", "1"))


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedStep:
    """Traces, compiles where the graph is new, and dispatches each step."""

    backend: XlaReplicas
    step: StepFunction
    replicas: tuple[Replica, ...]

    def __call__(self, batches: Sequence[Batch], micro_step: int = 0) -> list[StepOutput]:
        """Dispatches one step on each replica's batch; does not wait for it."""
        # In this thread: torch's own backward threads are made at the first backward of the process, and know no XLA
        # device if that was before the client started.
        with reduce_with(self.backend), torch.autograd.set_multithreading_enabled(False):
            outputs = [self.step(replica, batch, micro_step)
                       for replica, batch in zip(self.replicas, batches, strict=True)]
        torch_xla.sync()
        return outputs

    def publish(self) -> None:
        """A traced step leaves its state in the modules and optimizers."""
