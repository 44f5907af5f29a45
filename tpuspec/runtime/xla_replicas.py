"""XLA, data parallel: one replica per device, those of a host driven by one Python thread."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch_xla
import torch_xla.core.xla_model as xm
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tpuspec.config import CaptureMode, RunConfig
from tpuspec.errors import ConfigError, DeviceError
from tpuspec.precision import reduction_dtype
from tpuspec.runtime import graph
from tpuspec.runtime.alone import Alone
from tpuspec.runtime.capture import CapturedStep
from tpuspec.runtime.client import start_client
from tpuspec.runtime.environment import KEEP_BARRIERS
from tpuspec.runtime.formulas import register_formulas
from tpuspec.runtime.kernels import register_kernels
from tpuspec.runtime.optimizer_numbers import NumbersOfSteps, OptimizerNumbers
from tpuspec.runtime.placement import copy_module, module_as_before, move_module
from tpuspec.runtime.pod import Pod
from tpuspec.runtime.same_start import start_from_chief
from tpuspec.runtime.sent_batch import SentBatch
from tpuspec.runtime.several_steps import SeveralSteps, StepsInOne
from tpuspec.runtime.slots import read_slots
from tpuspec.runtime.stacked import StackedStep, only_on_chief
from tpuspec.runtime.topology import count_replicas
from tpuspec.runtime.torch_optimizers import check_supported
from tpuspec.runtime.xla_pod import find_pod
from tpuspec.spec.backend import CompiledStep, Replica, RngState, StepFunction, Topology
from tpuspec.spec.coordinator import Coordinator
from tpuspec.spec.phase import in_phase
from tpuspec.spec.results import Batch, StepOutput
from tpuspec.spec.train_op import reduce_with

T = TypeVar("T")

_MOST_BYTES_AT_ONCE = 16 << 20
_SEED_OF_REPLICA = 0x9E3779B97F4A7C15
"""Replica i draws with seed + i times this, so that no two of them drop the same units; replica 0 as one device."""


class XlaReplicas:
    """XLA devices as replicas; see `spec.backend.Backend` for the verbs.

    Args:
      devices: of this host.
      topology: of all hosts.
      capture, audit_every_steps: as in RunConfig.
      groups: devices that compute together, where that is not all of them.
      pod: the hosts; None for one. Host tensors go to the chief over the devices, within the step.
    """

    static_shapes = True

    def __init__(self, devices: Sequence[torch.device], topology: Topology, *,
                 capture: CaptureMode = CaptureMode.off, audit_every_steps: int = 1000,
                 groups: list[list[int]] | None = None, pod: Pod | None = None) -> None:
        register_formulas()
        register_kernels()
        self._devices = tuple(devices)
        self._names = tuple(str(device) for device in devices)
        self._capture, self._audit_every = capture, audit_every_steps
        self._groups = groups
        self._newest: CapturedStep | SeveralSteps | None = None
        self._pod = pod
        self.coordinator: Coordinator = Alone() if pod is None else pod.coordinator
        self.topology = topology
        self._first_ordinal = topology.host_index * topology.num_replicas_per_host

    @property
    def step_kind(self) -> str:
        """How the newest step ran, 'traced' or 'replay'; before the first one what is planned."""
        if self._newest is None:
            return "traced" if self._capture is CaptureMode.off else "to be captured"
        return self._newest.kind

    @classmethod
    def start(cls, config: RunConfig, *, platform: str, reason: str) -> XlaReplicas:
        """Starts the XLA client, or joins the one that runs, and checks that it is what the settings ask for.

        Raises:
          DeviceError: no device, or the client runs on another platform or with other devices.
          ConfigError: num_shards or num_cores_per_replica do not fit the devices.
        """
        client = start_client(platform, spmd=False)
        if config.tpu_config.steps_per_execution > 1 and client.num_hosts > 1:
            raise ConfigError(f"steps_per_execution is for one host; this pod has {client.num_hosts}, which agree on "
                              "each batch. Set it to 1.")
        _check_barriers(config, client.hardware)
        hardware, num_devices, num_hosts = client.hardware, client.num_devices, client.num_hosts
        shards, is_cpu = config.tpu_config.num_shards, client.hardware == "CPU"
        if is_cpu and shards is not None:
            if num_devices % shards:
                raise ConfigError(
                    f"TPUConfig.num_shards is not set correctly, it should be ({num_devices}), got ({shards}), or "
                    f"divide it. The XLA client of this process already runs with that many CPU devices: set "
                    f"CPU_NUM_DEVICES={shards} before the first XLA call, or make the Trainer with the most shards "
                    "first. Leave it None to take what is found.")
            num_replicas = shards
        else:
            num_replicas = count_replicas(config.tpu_config, num_devices=num_devices * num_hosts,
                                          num_devices_per_host=num_devices)
            if num_replicas != num_devices * num_hosts and num_hosts > 1:
                raise ConfigError(f"num_shards=1 takes one device, and this pod has {num_hosts} hosts. Leave it None, "
                                  "or start on one host.")
            num_replicas //= num_hosts
        devices = [torch_xla.device(i) for i in range(num_replicas)]
        names = tuple(f"{hardware}:{i}" for i in range(num_replicas))
        # A program is compiled for all devices of the client: those that take no part make groups of their own.
        groups = None if num_replicas == num_devices else [
            list(range(first, first + num_replicas)) for first in range(0, num_devices, num_replicas)]
        return cls(devices, Topology(
            platform=hardware, devices=names, num_replicas_per_host=num_replicas, num_hosts=num_hosts,
            host_index=client.host_index, reason=reason),
            capture=config.capture, audit_every_steps=config.audit_every_steps, groups=groups,
            pod=find_pod(config.heartbeat_seconds))

    def place(self, model: nn.Module | None) -> list[Replica]:
        """Puts a copy of the module on each device: the first holds the module itself."""
        replicas = []
        if model is not None:
            start_from_chief(model, self.coordinator)
        modules = [model, *(None if model is None else copy_module(model) for _ in self._devices[1:])]
        for ordinal, (device, module) in enumerate(zip(self._devices, modules, strict=True)):
            graph.use_device(self._names[ordinal])
            if module is not None:
                move_module(module, device)
            replicas.append(Replica(ordinal=self._first_ordinal + ordinal, device=device, model=module,
                                    global_step=torch.zeros(1, dtype=torch.int64).to(device)))
        graph.use_device(self._names[0])
        torch_xla.sync(wait=True)
        return replicas

    def seed(self, seed: int) -> None:
        """Seeds torch on the host and the random state of each device, each with its own."""
        torch.manual_seed(seed)
        for ordinal, device in enumerate(self._names, start=self._first_ordinal):
            graph.set_seed((seed + ordinal * _SEED_OF_REPLICA) % (1 << 64), device)

    def rng_state(self) -> RngState:
        """Reads torch's random state on the host and the seed of each device."""
        return RngState(host=torch.get_rng_state(),
                        devices=tuple(graph.get_seed(device) for device in self._names))

    def set_rng_state(self, state: RngState) -> None:
        """Puts the random state of host and devices back."""
        torch.set_rng_state(state.host)
        for device, seed in zip(self._names, state.devices, strict=True):
            graph.set_seed(seed, device)

    def feed(self, batches: Sequence[Batch]) -> list[Batch]:
        """Sends each replica's tensors in one call."""
        return [SentBatch(batch, graph.send(batch.tensors(), device))  # type: ignore[misc]  # a Batch in all but name
                for batch, device in zip(batches, self._names, strict=True)]

    def feed_several(self, batches: Sequence[Sequence[Batch]]) -> list[list[Batch]]:
        """Sends each replica's tensors of several steps in one call."""
        fed: list[list[Batch]] = [[] for _ in batches]
        for device, parts in zip(self._names, zip(*batches, strict=True), strict=True):
            tensors = [part.tensors() for part in parts]
            sent = iter(graph.send(list(itertools.chain.from_iterable(tensors)), device))
            for of_step, part, own in zip(fed, parts, tensors, strict=True):
                of_step.append(SentBatch(part, list(itertools.islice(sent, len(own)))))  # type: ignore[arg-type]
        return fed

    def compile_step(self, step: StepFunction, replicas: Sequence[Replica], *, num_at_once: int = 1) -> NewestStep:
        """Makes a step that is traced, compiled and, unless capture is off, replayed when it is called."""
        for replica in replicas:
            for optimizer in replica.optimizers.values():
                check_supported(optimizer)
        alone = self.topology.num_replicas == 1
        if self._pod is not None:
            step = StackedStep(step=step, gather=self.gather, num_replicas=self.topology.num_replicas)
        captured = CapturedStep(
            step, replicas, mode=self._capture, audit_every=self._audit_every, enter=self._in_step, name="the step",
            fallback=TracedStep(step=step, replica=replicas[0], enter=self._in_step,
                                numbers=OptimizerNumbers(replicas)) if alone else None)
        if self._pod is not None:
            return NewestStep(self, captured, only_on_chief(captured, self.topology))
        if num_at_once == 1 or self._capture is CaptureMode.off:
            return NewestStep(self, captured)
        numbers = NumbersOfSteps(replicas)
        together = CapturedStep(
            StepsInOne(step=step, numbers=numbers), replicas, mode=self._capture, audit_every=self._audit_every,
            enter=self._in_step, name=f"a program of {num_at_once} steps", numbers=numbers,
            num_steps=num_at_once)
        return NewestStep(self, SeveralSteps(captured, together, numbers, num_at_once))

    @contextlib.contextmanager
    def _in_step(self) -> Iterator[None]:
        if self._pod is not None:
            graph.set_replication(graph.all_devices())
        else:
            several = len(self._devices) > 1
            graph.set_replication(
                [name.replace("xla", self.topology.platform) for name in self._names] if several else [])
        try:
            with reduce_with(self):
                yield
        finally:
            graph.use_device(self._names[0])

    def rehearse(self, replica: Replica, fn: Callable[[], T]) -> T:
        """Traces `fn`; nothing is compiled, and buffers and random state are put back."""
        random_state = self.rng_state()
        try:
            # As in a step: model_fn may call torch.autograd.grad.
            with module_as_before(replica.model), torch.autograd.set_multithreading_enabled(False):
                return fn()
        finally:
            self.set_rng_state(random_state)
            if replica.model is not None:
                # Makes the written-back buffers plain device data: the first step's graph is then that of all others.
                graph.materialize(list(replica.model.buffers()), str(replica.device))

    def fetch(self, tree: T) -> T:
        """Copies every XLA tensor of the structure to the host; small ones in one transfer a device."""
        leaves, structure = pytree.tree_flatten(tree)
        places: dict[torch.device, list[int]] = {}
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.device.type == "xla":
                places.setdefault(leaf.device, []).append(i)
        for numbers in places.values():
            for part in _parts_of(numbers, leaves):
                for i, tensor in zip(part, graph.fetch([leaves[i] for i in part]), strict=True):
                    leaves[i] = tensor
        return pytree.tree_unflatten(leaves, structure)

    def reduce_gradients(self, optimizer: torch.optim.Optimizer, reduction: str) -> None:
        """Reduces the gradients over all replicas and applies them; with one replica mean and sum are one."""
        if self.topology.num_replicas == 1:
            optimizer.step()
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]
                      if parameter.grad is not None]
        # Copies: the reduction in place would not see what was added to a gradient in place before. Halves are summed
        # as float32, which XLA:CPU needs, and which keeps the bits that many replicas would lose.
        gradients = [parameter.grad.detach().to(reduction_dtype(parameter.grad.dtype), copy=True)
                     for parameter in parameters]
        scale = 1.0 / self.topology.num_replicas if reduction == "mean" else 1.0
        # As xm.optimizer_step, which asks once in a process for the number of replicas, and keeps the answer.
        xm.all_reduce(xm.REDUCE_SUM, gradients, scale=scale, groups=self._groups)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.to(parameter.grad.dtype)
        # What is read from here on would wait for replicas that are not launched yet.
        graph.allow_execution(False)
        optimizer.step()

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenates a tensor over all replicas; not pinned to a layout, which would differ on every replica."""
        if self.topology.num_replicas == 1:
            return tensor
        gathered = xm.all_gather(tensor, dim=0, groups=self._groups, pin_layout=False)
        graph.allow_execution(False)
        if self._pod is None or self._pod.order == tuple(range(self.topology.num_replicas)):
            return gathered
        parts = gathered.chunk(self.topology.num_replicas)
        return torch.cat([parts[place] for place in self._pod.order])


def _parts_of(numbers: Sequence[int], leaves: Sequence[Any]) -> Iterator[list[int]]:
    """Yields numbers of tensors that are fetched at once: torch_xla holds each twice until its transfer ends."""
    part: list[int] = []
    num_bytes = 0
    for number in numbers:
        if part and num_bytes + leaves[number].nbytes > _MOST_BYTES_AT_ONCE:
            yield part
            part, num_bytes = [], 0
        part.append(number)
        num_bytes += leaves[number].nbytes
    if part:
        yield part


def _check_barriers(config: RunConfig, hardware: str) -> None:
    if (config.tpu_config.steps_per_execution > 1 and hardware == "CPU"
            and KEEP_BARRIERS not in os.environ.get("XLA_FLAGS", "")):
        raise DeviceError(
            f"steps_per_execution came too late: the XLA client of this process already runs without {KEEP_BARRIERS}, "
            "and would fuse a step with the next one, which changes its last bits. Make the Trainer before the first "
            f"XLA call of the process, or set XLA_FLAGS={KEEP_BARRIERS}.")


class NewestStep:
    """A step that tells its backend how it ran; see `spec.backend.CompiledStep` and `RunsSeveral`.

    Args:
      backend: is told.
      step: tells how it ran.
      entry: dispatches it, where that is not the step itself.
    """

    def __init__(self, backend: XlaReplicas, step: CapturedStep | SeveralSteps, entry: CompiledStep | None = None,
                 ) -> None:
        self._backend, self._step, self._entry = backend, step, entry or step

    @property
    def num_at_once(self) -> int:
        return self._step.num_at_once if isinstance(self._step, SeveralSteps) else 1

    def __call__(self, batches: Sequence[Batch], micro_step: int = 0) -> list[StepOutput]:
        self._backend._newest = self._step
        return self._entry(batches, micro_step)

    def feed_several(self, batches: Sequence[Sequence[Batch]]) -> list[list[Batch]]:
        return self._backend.feed_several(batches)

    def run_several(self, batches: Sequence[Sequence[Batch]], after_each: Callable[[], None],
                    ) -> list[list[StepOutput]] | None:
        assert isinstance(self._step, SeveralSteps)
        self._backend._newest = self._step
        return self._step.run_several(batches, after_each)

    def publish(self) -> None:
        self._entry.publish()


@dataclass(slots=True, kw_only=True)
class TracedStep:
    """Traces, compiles where the graph is new, and dispatches each step of one replica, as plain torch_xla does.

    Attributes:
      compiled: number of a batch within an update -> whether its newest step had to be compiled.
    """

    step: StepFunction
    replica: Replica
    enter: Callable[[], Any]
    numbers: OptimizerNumbers
    compiled: dict[int, bool] = field(default_factory=dict)
    _is_settled: bool = field(default=False, init=False)

    def publish(self) -> None:
        """A boundary: what hooks write there is no part of the next step, whose bits it would change."""
        self._is_settled = False

    def __call__(self, batches: Sequence[Batch], micro_step: int = 0) -> list[StepOutput]:
        """Dispatches one step; does not wait for it."""
        if not self._is_settled:
            self.numbers.settle()
            graph.materialize(graph.waiting(list(read_slots(self.replica).values())), str(self.replica.device))
            self._is_settled = True
        device = str(self.replica.device)
        seed = graph.get_seed(device)
        # In this thread: torch's own backward threads are made at the first backward of the process, and know no XLA
        # device if that was before the client started.
        with (self.enter(), torch.autograd.set_multithreading_enabled(False),
              self.numbers.in_place(self.replica)):
            outputs = [self.step(self.replica, batches[0], micro_step)]
        # Optimizers that make state in their first step have two graphs, so compiles come in a row.
        may_compile = self.compiled.get(micro_step, True)
        with in_phase("compile") if may_compile else contextlib.nullcontext():
            self.compiled[micro_step] = graph.end_step()
        graph.set_seed(graph.next_seed(seed), device)  # torch.utils.checkpoint may have set another one within the step
        return outputs
