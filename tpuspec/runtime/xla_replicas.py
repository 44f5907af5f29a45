"""XLA, data parallel: one module is traced, and an engine runs its program on all replicas.

On the hosts of a pod each device has a module of its own, which one thread drives on torch_xla's own runtime.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch_xla
import torch_xla.core.xla_model as xm
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tpuspec.config import CaptureMode, RunConfig
from tpuspec.errors import ConfigError
from tpuspec.precision import reduction_dtype
from tpuspec.runtime import graph
from tpuspec.runtime.alone import Alone
from tpuspec.runtime.as_replicas import computing_as
from tpuspec.runtime.capture import CapturedStep
from tpuspec.runtime.checksums import checksums
from tpuspec.runtime.client import start_client
from tpuspec.runtime.formulas import register_formulas
from tpuspec.runtime.kernels import register_kernels
from tpuspec.runtime.optimizer_numbers import OptimizerNumbers
from tpuspec.runtime.placement import copy_module, module_as_before, move_module
from tpuspec.runtime.pod import Pod
from tpuspec.runtime.replica_state import EngineState, ReplicaState
from tpuspec.runtime.runtimes import SEED_OF_REPLICA, OnEngine, OnTorchXla
from tpuspec.runtime.same_start import start_from_chief
from tpuspec.runtime.sent_batch import SentBatch
from tpuspec.runtime.several_steps import SeveralSteps
from tpuspec.runtime.stacked import StackedStep, only_on_chief
from tpuspec.runtime.topology import count_replicas
from tpuspec.runtime.torch_optimizers import check_supported
from tpuspec.runtime.traced_step import TracedStep
from tpuspec.runtime.xla_pod import find_pod
from tpuspec.spec.backend import CompiledStep, Replica, RngState, StepFunction, Topology
from tpuspec.spec.coordinator import Coordinator
from tpuspec.spec.engine import Engine, Engines
from tpuspec.spec.results import Batch, StepOutput
from tpuspec.spec.train_op import reduce_with

T = TypeVar("T")

_MOST_BYTES_AT_ONCE = 16 << 20


class XlaReplicas:
    """XLA devices as replicas; see `spec.backend.Backend` for the verbs.

    Args:
      devices: of this host.
      topology: of all hosts.
      capture, audit_every_steps: as in RunConfig.
      pod: the hosts; None for one. Host tensors go to the chief over the devices, within the step.
      engine: runs the programs, for all replicas of this process, of which `devices` trace the first; None lets
        torch_xla's own runtime do so.
    """

    static_shapes = True

    def __init__(self, devices: Sequence[torch.device], topology: Topology, *,
                 capture: CaptureMode = CaptureMode.off, audit_every_steps: int = 1000,
                 pod: Pod | None = None, engine: Engine | None = None) -> None:
        register_formulas()
        register_kernels()
        self._devices = tuple(devices)
        self._names = tuple(str(device) for device in devices)
        self._capture, self._audit_every = capture, audit_every_steps
        self._newest: CapturedStep | SeveralSteps | None = None
        self._pod, self._engine = pod, engine
        self._runtime = OnTorchXla() if engine is None else OnEngine(engine)
        self._states: dict[int, ReplicaState] = {}
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
    def start(cls, config: RunConfig, *, platform: str, reason: str, engines: Engines | None) -> XlaReplicas:
        """Starts the XLA client, or joins the one that runs, and checks that it is what the settings ask for.

        Args:
          config: the settings of the run.
          platform: of PJRT.
          reason: why it was chosen.
          engines: of the platform; None on a pod, where torch_xla's own runtime joins the hosts.

        Raises:
          DeviceError: no device, or the client runs on another platform or with other devices.
          ConfigError: num_shards or num_cores_per_replica do not fit the devices.
        """
        client = start_client("CPU" if engines is not None else platform, spmd=False)
        if config.tpu_config.steps_per_execution > 1 and client.num_hosts > 1:
            raise ConfigError(f"steps_per_execution is for one host; this pod has {client.num_hosts}, which agree on "
                              "each batch. Set it to 1.")
        hardware, num_hosts = platform.split("_")[0], client.num_hosts
        num_devices = client.num_devices if engines is None or hardware == "CPU" else engines.num_devices()
        shards, is_cpu = config.tpu_config.num_shards, hardware == "CPU"
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
        engine = engines.make(num_replicas) if engines is not None else None
        devices = [torch_xla.device(i) for i in range(num_replicas if engine is None else 1)]
        names = tuple(f"{hardware}:{i}" for i in range(num_replicas))
        return cls(devices, Topology(
            platform=hardware, devices=names, num_replicas_per_host=num_replicas, num_hosts=num_hosts,
            host_index=client.host_index, reason=reason),
            capture=config.capture, audit_every_steps=config.audit_every_steps,
            pod=find_pod(config.heartbeat_seconds), engine=engine)

    def place(self, model: nn.Module | None) -> list[Replica]:
        """Puts the module on the device that traces it, and on a pod a copy on each of the others."""
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
            graph.set_seed((seed + ordinal * SEED_OF_REPLICA) % (1 << 64), device)

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
        """Makes the replicas' batches inputs of a program; on a pod sends each replica's tensors in one call."""
        if self._engine is not None:
            # A step is traced with the first replica's tensors, which are sent only then.
            return [SentBatch(batches[0], lambda tensors: graph.send_apart(tensors, self._names[0]),
                              self._engine.of_batches([batch.tensors() for batch in batches]))]  # type: ignore[list-item]
        return [SentBatch(batch, lambda tensors, device=device: graph.send(tensors, device))  # type: ignore[misc]
                for batch, device in zip(batches, self._names, strict=True)]  # Batches in all but name

    def feed_several(self, batches: Sequence[Sequence[Batch]]) -> list[list[Batch]]:
        """Sends each replica's tensors of several steps."""
        return [self.feed(of_step) for of_step in batches]

    def compile_step(self, step: StepFunction, replicas: Sequence[Replica], *, num_at_once: int = 1) -> NewestStep:
        """Makes a step that is traced, compiled and, unless capture is off, replayed when it is called."""
        for replica in replicas:
            for optimizer in replica.optimizers.values():
                check_supported(optimizer)
        alone = self.topology.num_replicas == 1
        num_stacked = self.topology.num_replicas if self._engine is not None and not alone else 0
        states = [self._state_of(replica) for replica in replicas]
        if self._pod is not None:
            step = StackedStep(step=step, gather=self.gather, num_replicas=self.topology.num_replicas)
        captured = CapturedStep(
            step, states, mode=self._capture, audit_every=self._audit_every, enter=self._in_step, name="the step",
            num_stacked=num_stacked,
            fallback=TracedStep(step=step, replica=replicas[0], enter=self._in_step,
                                numbers=OptimizerNumbers(replicas)) if alone else None)
        if self._pod is not None:
            return NewestStep(self, captured, only_on_chief(captured, self.topology))
        if num_at_once == 1 or self._engine is None:
            return NewestStep(self, captured)
        return NewestStep(self, SeveralSteps(captured, num_at_once))

    def _state_of(self, replica: Replica) -> ReplicaState:
        if replica.ordinal not in self._states:
            num_replicas = self.topology.num_replicas
            self._states[replica.ordinal] = (
                EngineState(replica, self._runtime, num_replicas) if isinstance(self._runtime, OnEngine) else
                ReplicaState(replica, self._runtime, num_replicas))
        return self._states[replica.ordinal]

    @contextlib.contextmanager
    def _in_step(self) -> Iterator[None]:
        if self._engine is not None:
            graph.set_replication([])
        elif self._pod is not None:
            graph.set_replication(graph.all_devices())
        else:
            several = len(self._devices) > 1
            graph.set_replication(
                [name.replace("xla", self.topology.platform) for name in self._names] if several else [])
        try:
            with reduce_with(self), (computing_as(self.topology.num_replicas) if self._engine is not None
                                      else contextlib.nullcontext()):
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
        if self._engine is not None:
            outputs = {i: leaf for i, leaf in enumerate(leaves)
                       if not isinstance(leaf, Tensor) and hasattr(leaf, "__array__")}
            of_xla = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.device.type == "xla"]
            state = self.arrays_of([leaves[i] for i in of_xla])
            of_state = {i: array for i, array in zip(of_xla, state, strict=True) if array is not None}
            for arrays, fetch in ((outputs, self._engine.fetch), (of_state, self._engine.fetch_whole)):
                for i, tensor in zip(arrays, fetch(list(arrays.values())), strict=True):
                    leaves[i] = tensor
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.device.type == "xla":
                places.setdefault(leaf.device, []).append(i)
        for numbers in places.values():
            for part in _parts_of(numbers, leaves):
                for i, tensor in zip(part, graph.fetch([leaves[i] for i in part]), strict=True):
                    leaves[i] = tensor
        return pytree.tree_unflatten(leaves, structure)

    def arrays_of(self, tensors: Sequence[Tensor]) -> list[Any]:
        """Returns for each tensor the engine's array that has its value; None for what is no state."""
        found: list[Any] = [None] * len(tensors)
        for state in self._states.values() if tensors else ():
            found = [own if array is None else array
                     for array, own in zip(found, state.arrays_of(tensors), strict=True)]
        return found

    def keeping_statistics(self, *, whole: bool) -> contextlib.AbstractContextManager[None]:
        """Gives each replica its own buffers back at the end of a block."""
        state = next(iter(self._states.values()), None)
        return state.keeping_own(whole=whole) if isinstance(state, EngineState) else contextlib.nullcontext()

    def sums_of_parameters(self, replicas: Sequence[Replica]) -> list[Tensor]:
        """Returns for each local replica the sums of values and of sizes of its parameters."""
        state, model = self._state_of(replicas[0]), replicas[0].model
        assert model is not None
        if self._engine is None:
            return self.fetch([checksums(replica.model) for replica in replicas if replica.model is not None])
        parameters = list(model.parameters())
        arrays = [self._runtime.take([parameter])[0] if array is None else array
                  for parameter, array in zip(parameters, state.arrays_of(parameters), strict=True)]
        return list(self._engine.sums(arrays))

    def reduce_gradients(self, optimizer: torch.optim.Optimizer, reduction: str) -> None:
        """Reduces the gradients over all replicas and applies them; with one replica mean and sum are one."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]
                      if parameter.grad is not None]
        if self._engine is not None:
            if self.topology.num_replicas > 1:
                scale = self.topology.num_replicas if reduction == "sum" else 1
                for parameter in parameters:  # copies: see below
                    gradient = parameter.grad.detach().clone()
                    parameter.grad = gradient if scale == 1 else gradient.mul_(scale)
            xm.optimizer_step(optimizer)
            if self.topology.num_replicas > 1:
                graph.allow_execution(False)
            return
        if self.topology.num_replicas == 1:
            optimizer.step()
            return
        # Copies: the reduction in place would not see what was added to a gradient in place before. Halves are summed
        # as float32, which XLA:CPU needs, and which keeps the bits that many replicas would lose.
        gradients = [parameter.grad.detach().to(reduction_dtype(parameter.grad.dtype), copy=True)
                     for parameter in parameters]
        scale = 1.0 / self.topology.num_replicas if reduction == "mean" else 1.0
        # As xm.optimizer_step, which asks once in a process for the number of replicas, and keeps the answer.
        xm.all_reduce(xm.REDUCE_SUM, gradients, scale=scale)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.to(parameter.grad.dtype)
        # What is read from here on would wait for replicas that are not launched yet.
        graph.allow_execution(False)
        optimizer.step()

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenates a tensor over all replicas; not pinned to a layout, which would differ on every replica."""
        if self.topology.num_replicas == 1:
            return tensor
        gathered = xm.all_gather(tensor, dim=0, pin_layout=False)
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
