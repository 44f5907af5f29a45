"""XLA, SPMD: one program over the rows of all replicas, which XLA splits over a mesh of devices.

All devices of the host are one logical device. Parameters, their optimizer state and the batch are split as
`MeshLayout` says; the compiler puts in whatever the devices must exchange. A step is captured as that of one device is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch_xla
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tpuspec.config import InputPipelineConfig, RunConfig, TPUConfig
from tpuspec.errors import ConfigError, SpecError
from tpuspec.mesh import DATA_AXIS
from tpuspec.runtime.client import start_client
from tpuspec.runtime.layout import MeshLayout
from tpuspec.runtime.placement import move_module
from tpuspec.runtime.sent_batch import SentBatch
from tpuspec.runtime.sharding_rules import shard_parameters
from tpuspec.runtime.topology import mesh_axes
from tpuspec.runtime.xla_replicas import NewestStep, XlaReplicas
from tpuspec.spec.backend import CompiledStep, Replica, RngState, StepFunction, Topology
from tpuspec.spec.results import Batch, StepOutput, flat_tensors, rebuild
from tpuspec.spec.train_op import GradientReducer, reduce_with

T = TypeVar("T")


class XlaSpmd:
    """The devices of this host as one logical device; see `spec.backend.Backend` for the verbs.

    Args:
      device: drives the logical device.
      layout: of tensors on the mesh.
      topology: who computes.
      config: has the sharding rules.
    """

    static_shapes = True

    def __init__(self, device: XlaReplicas, layout: MeshLayout, topology: Topology, config: TPUConfig) -> None:
        self._device, self._layout, self._config = device, layout, config
        self.topology = topology
        self.coordinator = device.coordinator

    @classmethod
    def start(cls, config: RunConfig, *, platform: str, reason: str) -> XlaSpmd:
        """Starts the XLA client in SPMD mode, or joins the one that runs so.

        Raises:
          DeviceError: no device, or the client runs without SPMD, on another platform or with other devices.
          ConfigError: the mesh does not fit the devices, or the input deployment does not fit a mesh.
        """
        tpu = config.tpu_config
        if tpu.per_host_input_for_training is InputPipelineConfig.BROADCAST:
            raise ConfigError("per_host_input_for_training=BROADCAST gives every replica the same rows; with a mesh "
                              "one program has the rows of all replicas. Set PER_HOST_V1 or PER_HOST_V2.")
        client = start_client(platform, spmd=True)
        axes = mesh_axes(tpu, num_devices=client.num_devices)
        num_replicas = axes.get(DATA_AXIS, 1)
        topology = Topology(
            platform=client.hardware, devices=tuple(f"{client.hardware}:{i}" for i in range(client.num_devices)),
            num_replicas_per_host=num_replicas, reason=reason, mesh=axes, replicas_per_program=num_replicas)
        one_device = XlaReplicas(
            [torch_xla.device()], replace(topology, num_replicas_per_host=1), capture=config.capture,
            audit_every_steps=config.audit_every_steps)
        return cls(one_device, MeshLayout(axes, tpu.input_partition_dims), topology, tpu)

    @property
    def step_kind(self) -> str:
        """How the newest step ran, 'traced' or 'replay'; before the first one what is planned."""
        return self._device.step_kind

    def place(self, model: nn.Module | None) -> list[Replica]:
        """Puts the module on the mesh, each parameter split by its rule.

        Raises:
          ConfigError: a rule matches nothing, or does not fit what it matches.
        """
        parameters = {} if model is None else dict(model.named_parameters())
        self._layout.set_parameters(shard_parameters(
            {name: tuple(parameter.shape) for name, parameter in parameters.items()}, self._layout.axes,
            rules=self._config.sharding, fsdp=self._config.fsdp))
        device = torch_xla.device()
        if model is not None:
            move_module(model, device)
        replica = Replica(ordinal=0, device=device, model=model,
                          global_step=torch.zeros(1, dtype=torch.int64).to(device))
        self._layout.settle(replica)  # before the transfer: each device gets its part only
        torch_xla.sync(wait=True)
        return [replica]

    def seed(self, seed: int) -> None:
        """Seeds torch on the host and the random state of the logical device."""
        self._device.seed(seed)

    def rng_state(self) -> RngState:
        """Reads torch's random state on the host and the seed of the logical device."""
        return self._device.rng_state()

    def set_rng_state(self, state: RngState) -> None:
        """Puts the random state of host and device back."""
        self._device.set_rng_state(state)

    def feed(self, batches: Sequence[Batch]) -> list[Batch]:
        """Sends the batches of all replicas as one, each row to the devices of its replica.

        Raises:
          ConfigError: input_partition_dims do not fit the batch.
        """
        batch = batches[0]
        if len(batches) > 1:
            joined = iter([torch.cat(parts) for parts in zip(*(part.tensors() for part in batches), strict=True)])
            batch = batch.map(lambda _: next(joined))
        sent = self._layout.send(batch, str(torch_xla.device()))
        return [SentBatch(batch, lambda _: sent)]  # type: ignore[list-item]  # a Batch in all but name

    def compile_step(self, step: StepFunction, replicas: Sequence[Replica], *, num_at_once: int = 1) -> CompiledStep:
        """Makes a step that keeps the layout of its state and whose outputs are whole on every device."""
        laid_out = _LaidOutStep(step=step, layout=self._layout, reducer=self)
        step_of_device = self._device.compile_step(laid_out, replicas, num_at_once=num_at_once)
        return _SettledStep(step_of_device, self._layout, replicas[0], self.feed)

    def rehearse(self, replica: Replica, fn: Callable[[], T]) -> T:
        """Traces `fn`; nothing is compiled, and buffers and random state are put back."""
        return self._device.rehearse(replica, fn)

    def fetch(self, tree: T) -> T:
        """Copies every XLA tensor of the structure to the host; what is split is put together there."""
        leaves, structure = pytree.tree_flatten(tree)
        numbers = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.device.type == "xla"]
        for i, tensor in zip(numbers, self._layout.fetch([leaves[i] for i in numbers]), strict=True):
            leaves[i] = tensor
        return pytree.tree_unflatten(leaves, structure)

    def keeping_statistics(self, *, whole: bool) -> contextlib.AbstractContextManager[None]:
        """There is one program, with one of everything."""
        return contextlib.nullcontext()

    def sums_of_parameters(self, replicas: Sequence[Replica]) -> list[Tensor]:
        """There is one of everything: nothing to compare."""
        return []

    def reduce_gradients(self, optimizer: torch.optim.Optimizer, reduction: str) -> None:
        """Applies the gradients, which are those of all rows already.

        Raises:
          SpecError: they are to be summed over replicas, which the one program does not know.
        """
        if reduction == "sum" and self.topology.num_replicas > 1:
            raise SpecError("CrossShardOptimizer(reduction='sum') sums the gradients of replicas; with a mesh one "
                            "program computes the loss over the rows of all replicas. Use 'mean', and scale the loss.")
        optimizer.step()

    def gather(self, tensor: Tensor) -> Tensor:
        """Returns the tensor, which has the rows of all replicas already."""
        return tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _LaidOutStep:
    """A step whose state comes to lie where it belongs, and whose outputs are whole on every device."""

    step: StepFunction
    layout: MeshLayout
    reducer: GradientReducer

    def __call__(self, replica: Replica, batch: Batch, micro_step: int) -> StepOutput:
        with reduce_with(self.reducer):
            output = self.step(replica, batch, micro_step)
        tensors = [tensor.to(replica.device) for tensor in flat_tensors(output.tensors)]
        whole = self.layout.whole(tensors)
        self.layout.constrain(replica)
        return replace(output, tensors=rebuild(output.tensors, iter(whole)))


class _SettledStep:
    """A compiled step before which the state is put where it belongs, as far as it was read or written outside."""

    def __init__(self, step: NewestStep, layout: MeshLayout, replica: Replica,
                 feed: Callable[[Sequence[Batch]], list[Batch]]) -> None:
        self._feed = feed
        self._step, self._layout, self._replica = step, layout, replica
        self._is_settled = False

    @property
    def num_at_once(self) -> int:
        return self._step.num_at_once

    def __call__(self, batches: Sequence[Batch], micro_step: int = 0) -> list[StepOutput]:
        self._settle()
        return self._step(batches, micro_step)

    def feed_several(self, batches: Sequence[Sequence[Batch]]) -> list[list[Batch]]:
        return [self._feed(of_step) for of_step in batches]

    def run_several(self, batches: Sequence[Sequence[Batch]], after_each: Callable[[], None],
                    ) -> list[list[StepOutput]] | None:
        self._settle()
        return self._step.run_several(batches, after_each)

    def _settle(self) -> None:
        if not self._is_settled:
            self._layout.settle(self._replica)
            self._is_settled = True

    def publish(self) -> None:
        self._step.publish()
        self._is_settled = False
