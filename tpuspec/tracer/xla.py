"""XLA: one step is traced on the CPU by torch_xla, and an engine runs its program on all devices of all hosts."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch_xla
import torch_xla.core.xla_model as xm
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tpuspec.config import CaptureMode, InputPipelineConfig, RunConfig, TPUConfig
from tpuspec.errors import ConfigError, SpecError
from tpuspec.hosts.alone import Alone
from tpuspec.hosts.same_start import start_from_chief
from tpuspec.mesh import DATA_AXIS
from tpuspec.placement import module_as_before, move_module
from tpuspec.spec.backend import CompiledStep, Replica, RngState, StepFunction, Topology
from tpuspec.spec.coordinator import Coordinator
from tpuspec.spec.engine import Engine, EngineFactory
from tpuspec.spec.pieces import Stored
from tpuspec.spec.results import Batch, HostFunctions, StepOutput
from tpuspec.spec.train_op import reduce_with
from tpuspec.tracer import graph
from tpuspec.tracer.as_replicas import computing_as
from tpuspec.tracer.capture import CapturedStep
from tpuspec.tracer.client import start_client
from tpuspec.tracer.constraint import constrained
from tpuspec.tracer.formulas import register_formulas
from tpuspec.tracer.input_partition import all_parts
from tpuspec.tracer.kernels import register_kernels
from tpuspec.tracer.layouts import MeshLayouts, ReplicaLayouts
from tpuspec.tracer.on_engine import OnEngine
from tpuspec.tracer.optimizer_numbers import OptimizerNumbers
from tpuspec.tracer.replica_state import ReplicaState
from tpuspec.tracer.sent_batch import SentBatch, told_tensors
from tpuspec.tracer.several_steps import SeveralSteps
from tpuspec.tracer.sharding_rules import shard_parameters
from tpuspec.tracer.slots import told_slots
from tpuspec.tracer.sync_batch_norm import syncing_batch_norm
from tpuspec.tracer.topology import count_replicas_of_host, mesh_axes
from tpuspec.tracer.torch_optimizers import check_supported
from tpuspec.tracer.traced_step import TracedStep

T = TypeVar("T")

_MOST_BYTES_AT_ONCE = 16 << 20


class XlaBackend:
    """XLA devices as one, as replicas or as a mesh; see `spec.backend.Backend` for the verbs.

    Args:
      engine: runs the programs.
      topology: of all hosts.
      coordinator: what the hosts decide together.
      capture, audit_every_steps: as in RunConfig.
      config: has the sharding rules of a mesh.
    """

    static_shapes = True

    def __init__(self, engine: Engine, topology: Topology, coordinator: Coordinator | None = None, *,
                 capture: CaptureMode = CaptureMode.off, audit_every_steps: int = 1000,
                 config: TPUConfig | None = None) -> None:
        register_formulas()
        register_kernels()
        self._engine, self.topology = engine, topology
        self.coordinator: Coordinator = coordinator or Alone()
        self._capture, self._audit_every, self._config = capture, audit_every_steps, config
        self._device = torch_xla.device(0)
        self._name = str(self._device)
        self._runtime = OnEngine(engine, ReplicaLayouts())
        self._state: ReplicaState | None = None
        self._newest: CapturedStep | SeveralSteps | None = None
        self._fed: list[str] = []

    @property
    def step_kind(self) -> str:
        """How the newest step ran, 'traced' or 'replay'; before the first one what is planned."""
        if self._newest is None:
            return "traced" if self._capture is CaptureMode.off else "to be captured"
        return self._newest.kind

    @property
    def split_state(self) -> XlaBackend | None:
        """This backend, where a mesh spans several processes."""
        return self if self._engine.splits_state else None

    def inputs_of_newest(self) -> list[tuple[str, str]]:
        """Returns (kind, name) of each input of the program that was replayed last: of a `Slot`, or of a `Source`.

        Optimizer state is named by its parameter, and the batch's tensors by their places in it.
        """
        assert self._newest is not None and self._state is not None, "a step comes first"
        names = told_slots(self._state.replica)
        return [(source.key.kind, names.get(source.key, str(source.key))) if source.kind == "slot" else
                (source.kind, self._fed[source.key] if source.kind == "batch" else "")
                for source in self._newest.inputs or ()]

    @classmethod
    def start(cls, config: RunConfig, engines: EngineFactory, *, platform: str, reason: str,
              coordinator: Coordinator | None = None) -> XlaBackend:
        """Starts the clients, or joins those that run, and checks that they are what the settings ask for.

        Args:
          config: the settings of the run.
          engines: of the platform.
          platform: of PJRT.
          reason: why it was chosen.
          coordinator: of the hosts; None for one.

        Raises:
          DeviceError: no device, or a client runs on another platform or with other devices.
          ConfigError: the settings do not fit the devices, or the input deployment does not fit a mesh.
        """
        tpu, coordinator = config.tpu_config, coordinator or Alone()
        start_client()
        num_devices, num_hosts = engines.num_devices(), coordinator.num_hosts
        settings = functools.partial(
            Topology, platform=platform, num_hosts=num_hosts, host_index=coordinator.host_index, reason=reason)
        if tpu.is_spmd:
            if tpu.per_host_input_for_training is InputPipelineConfig.BROADCAST:
                raise ConfigError("per_host_input_for_training=BROADCAST gives every replica the same rows; with a "
                                  "mesh one program has the rows of all replicas. Set PER_HOST_V1 or PER_HOST_V2.")
            axes = mesh_axes(tpu, num_devices=num_devices * num_hosts, takes_all=platform != "CPU")
            num_replicas = axes.get(DATA_AXIS, 1)
            if num_replicas % num_hosts:
                raise ConfigError(
                    f"each of the {num_hosts} hosts feeds the rows of its own replicas, and the mesh axis "
                    f"{DATA_AXIS!r} has {num_replicas}. Make it a multiple of the hosts.")
            engine = engines.make_mesh(axes, all_parts(tpu.input_partition_dims))
            num_devices = math.prod(axes.values()) // num_hosts
            topology = settings(devices=tuple(f"{platform}:{i}" for i in range(num_devices)), mesh=axes,
                                num_replicas_per_host=num_replicas // num_hosts, replicas_per_program=num_replicas)
        else:
            num_replicas = count_replicas_of_host(tpu, platform, num_devices, num_hosts)
            engine = engines.make(num_replicas)
            topology = settings(devices=tuple(f"{platform}:{i}" for i in range(num_replicas)),
                                num_replicas_per_host=num_replicas)
        return cls(engine, topology, coordinator, capture=config.capture, audit_every_steps=config.audit_every_steps,
                   config=tpu)

    def place(self, model: nn.Module | None) -> list[Replica]:
        """Puts the module on the device that traces it; all hosts start from the chief's values.

        Raises:
          ConfigError: a sharding rule matches nothing, or does not fit what it matches.
          SpecError: the hosts built different modules.
        """
        if model is not None:
            start_from_chief(model, self.coordinator)
        layouts = {}
        if self.topology.mesh:
            assert self._config is not None
            shapes = {} if model is None else {name: tuple(each.shape) for name, each in model.named_parameters()}
            layouts = shard_parameters(shapes, self.topology.mesh, rules=self._config.sharding, fsdp=self._config.fsdp)
        graph.use_device(self._name)
        if model is not None:
            move_module(model, self._device,
                        None if self._engine.has_values else lambda tensor: graph.placeholders([tensor], self._name)[0])
        replica = Replica(ordinal=0, device=self._device, model=model,
                          global_step=torch.zeros(1, dtype=torch.int64).to(self._device))
        torch_xla.sync(wait=True)
        if self.topology.mesh and self._config is not None:
            self._runtime.layouts = MeshLayouts(
                self.topology.mesh, replica, layouts, self._config.input_partition_dims)
        return [replica]

    def seed(self, seed: int) -> None:
        """Seeds torch on the host and the random state of the devices; each replica draws with another one."""
        torch.manual_seed(seed)
        graph.set_seed(seed % (1 << 64), self._name)

    def rng_state(self) -> RngState:
        """Reads torch's random state on the host and the seed of the devices."""
        return RngState(host=torch.get_rng_state(), devices=(graph.get_seed(self._name),))

    def set_rng_state(self, state: RngState) -> None:
        """Puts the random state of host and devices back."""
        torch.set_rng_state(state.host)
        for seed in state.devices[:1]:
            graph.set_seed(seed, self._name)

    def feed(self, batches: Sequence[Batch]) -> list[Batch]:
        """Makes the batches of this host's replicas inputs of a program.

        A step is traced with the first replica's tensors, or with those of all where a mesh computes with all rows;
        they are sent to the device that traces only then.

        Raises:
          ConfigError: input_partition_dims do not fit the batch.
        """
        batches = self._of_programs(batches)
        layouts = self._runtime.layouts.of_batch(batches[0])
        arrays = self._engine.of_batches([each.tensors() for each in batches], layouts)
        if not self._engine.has_values:
            self._fed = told_tensors(batches[0])
        return [SentBatch(batches[0], self._send, arrays, layouts)]  # type: ignore[list-item]  # a Batch in all but name

    def feed_several(self, batches: Sequence[Sequence[Batch]]) -> list[list[Batch]]:
        """As `feed`, for the batches of several steps, which one program takes."""
        steps = [self._of_programs(of_step) for of_step in batches]
        layouts = self._runtime.layouts.of_batch(steps[0][0])
        together, arrays = self._engine.of_steps([[each.tensors() for each in of_step] for of_step in steps], layouts)
        return [[SentBatch(of_step[0], self._send, own, layouts, together)]  # type: ignore[list-item]  # as in feed
                for of_step, own in zip(steps, arrays, strict=True)]

    def _of_programs(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Returns for each program of this host its batch: a mesh is one, with the rows of all replicas."""
        if not self.topology.mesh or len(batches) == 1:
            return batches
        joined = iter([torch.cat(parts) for parts in zip(*(each.tensors() for each in batches), strict=True)])
        return [batches[0].map(lambda _: next(joined))]

    def _send(self, tensors: list[Tensor]) -> list[Tensor]:
        """Sends a batch to the device that traces, with as many rows as the replicas of a mesh over hosts have."""
        num_hosts = self.topology.num_hosts if self.topology.mesh else 1
        whole = [tensor.repeat(num_hosts, *[1] * (tensor.ndim - 1)) if num_hosts > 1 and tensor.ndim else tensor
                 for tensor in tensors]
        return self._runtime.send(whole, self._name)

    def compile_step(self, step: StepFunction, replicas: Sequence[Replica], *, num_at_once: int = 1) -> CompiledStep:
        """Makes a step that is traced, compiled and, unless capture is off, replayed when it is called."""
        (replica,) = replicas
        for optimizer in replica.optimizers.values():
            check_supported(optimizer)
        captured = CapturedStep(
            step, self._state_of(replica), mode=self._capture, audit_every=self._audit_every, enter=self._in_step,
            name="the step", num_stacked=0 if self._engine.num_replicas == 1 else self._engine.num_replicas,
            fallback=TracedStep(step=step, replica=replica, enter=self._in_step, numbers=OptimizerNumbers(replica))
            if self._engine.num_devices == 1 else None)
        return _Step(self, captured if num_at_once == 1 else SeveralSteps(captured, num_at_once))

    def _state_of(self, replica: Replica) -> ReplicaState:
        if self._state is None:
            self._state = ReplicaState(replica, self._runtime)
        return self._state

    @contextlib.contextmanager
    def _in_step(self) -> Iterator[None]:
        graph.use_device(self._name)
        num_replicas = self._engine.num_replicas
        with reduce_with(self), computing_as(num_replicas), syncing_batch_norm(num_replicas):
            yield

    def rehearse(self, replica: Replica, fn: Callable[[], T]) -> T:
        """Traces `fn`; nothing is compiled, and buffers and random state are put back."""
        random_state = self.rng_state()
        try:
            # As in a step: model_fn may call torch.autograd.grad.
            with self.keeping_statistics(whole=False):
                try:
                    with (module_as_before(replica.model), torch.autograd.set_multithreading_enabled(False),
                          syncing_batch_norm(1), self._runtime.tracing()):
                        return fn()
                finally:
                    if replica.model is not None:
                        # Makes the written-back buffers plain device data: the first step's graph is then that of
                        # all others.
                        self._runtime.settle(list(replica.model.buffers()), self._name)
        finally:
            self.set_rng_state(random_state)

    def fetch(self, tree: T) -> T:
        """Copies every array and XLA tensor of the structure to the host."""
        if type(tree) is list and not any(isinstance(leaf, Tensor) or not hasattr(leaf, "__array__") for leaf in tree):
            return self._engine.fetch(tree)  # type: ignore[return-value]  # of replayed steps
        return self._fetch(tree, self._engine.fetch_whole)

    def fetch_pieces(self, tree: Any) -> Any:
        """As `fetch`, but of tensors of the state that are split over processes those pieces that this one has."""
        return self._fetch(tree, self._engine.fetch_pieces)

    def _fetch(self, tree: Any, fetch_state: Callable[[Sequence[Any]], Sequence[Any]]) -> Any:
        leaves, structure = pytree.tree_flatten(tree)
        outputs = {i: leaf for i, leaf in enumerate(leaves)
                   if not isinstance(leaf, Tensor) and hasattr(leaf, "__array__")}
        of_xla = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.device.type == "xla"]
        state = self.arrays_of([leaves[i] for i in of_xla])
        of_state = {i: array for i, array in zip(of_xla, state, strict=True) if array is not None}
        for arrays, fetch in ((outputs, self._engine.fetch), (of_state, fetch_state)):
            for i, tensor in zip(arrays, fetch(list(arrays.values())), strict=True):
                leaves[i] = tensor
        for part in _parts_of([i for i in of_xla if i not in of_state], leaves):
            for i, tensor in zip(part, graph.fetch([leaves[i] for i in part]), strict=True):
                leaves[i] = tensor
        return pytree.tree_unflatten(leaves, structure)

    def arrays_of(self, tensors: Sequence[Tensor]) -> list[Any]:
        """Returns for each tensor the engine's array that has its value; None for what is no state."""
        return self._state.arrays_of(tensors) if self._state and tensors else [None] * len(tensors)

    def like_stored(self, stored: Sequence[Stored], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """Returns tensors of those shapes whose buffers are gone."""
        return graph.make_gone([torch.empty(each.shape, dtype=dtype, device="meta")
                                for each, dtype in zip(stored, dtypes, strict=True)], self._name)

    def take_stored(self, replica: Replica, pairs: Sequence[tuple[Tensor, Stored]]) -> None:
        """Gives tensors of the state values of a checkpoint."""
        self._state_of(replica).take_stored(pairs)

    def keeping_statistics(self, *, whole: bool) -> contextlib.AbstractContextManager[None]:
        """Gives each replica its own buffers back at the end of a block."""
        return self._state.keeping_own(whole=whole) if self._state else contextlib.nullcontext()

    def statistics(self) -> dict[str, Tensor]:
        """Returns the buffers of all replicas, [num_replicas, ...]."""
        return self._state.statistics() if self._state else {}

    def set_statistics(self, replica: Replica, statistics: Mapping[str, Tensor]) -> None:
        """Gives each replica its own buffers."""
        self._state_of(replica).set_statistics(statistics)

    def sums_of_parameters(self, replicas: Sequence[Replica]) -> list[Tensor]:
        """Returns for each replica of this host the sums of values and of sizes of its parameters."""
        model = replicas[0].model
        if model is None:
            return []
        parameters = list(model.parameters())
        arrays = [self._runtime.take([parameter])[0] if array is None else array
                  for parameter, array in zip(parameters, self.arrays_of(parameters), strict=True)]
        return list(self._engine.sums(arrays))

    def reduce_gradients(self, optimizer: torch.optim.Optimizer, reduction: str) -> None:
        """Reduces the gradients over all replicas and applies them; those of a mesh are of all rows already.

        Raises:
          SpecError: they are to be summed over replicas, which the one program of a mesh does not know.
        """
        num_replicas = self._engine.num_replicas
        if self.topology.mesh and reduction == "sum" and self.topology.num_replicas > 1:
            raise SpecError("CrossShardOptimizer(reduction='sum') sums the gradients of replicas; with a mesh one "
                            "program computes the loss over the rows of all replicas. Use 'mean', and scale the loss.")
        if num_replicas > 1:
            scale = num_replicas if reduction == "sum" else 1
            for parameter in (each for group in optimizer.param_groups for each in group["params"]):
                if parameter.grad is not None:
                    # Copies: the reduction in place would not see what was added to a gradient in place before.
                    gradient = parameter.grad.detach().clone()
                    parameter.grad = gradient if scale == 1 else gradient.mul_(scale)
        xm.optimizer_step(optimizer)
        if num_replicas > 1:
            graph.allow_execution(False)  # what is read from here on would have one replica's gradients

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenates a tensor over all replicas; a mesh has the rows of all already."""
        if self._engine.num_replicas == 1:
            return tensor
        gathered = xm.all_gather(tensor, dim=0, pin_layout=False)
        graph.allow_execution(False)
        return gathered

    def constrain(self, tensor: Tensor, axes: Sequence[Any]) -> Tensor:
        """Fixes how a tensor of the step lies on a mesh; without one returns it as it is.

        Raises:
          SpecError: the axes are not those of the mesh, or do not fit the tensor.
        """
        return constrained(tensor, axes, self.topology.mesh) if self.topology.mesh else tensor


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


class _Step:
    """A step that tells its backend how it ran; only the chief gets its outputs.

    See `spec.backend.CompiledStep` and `RunsSeveral`.
    """

    def __init__(self, backend: XlaBackend, step: CapturedStep | SeveralSteps) -> None:
        self._backend, self._step = backend, step
        self._is_chief = backend.topology.is_chief

    @property
    def num_at_once(self) -> int:
        return self._step.num_at_once if isinstance(self._step, SeveralSteps) else 1

    @property
    def num_replays_ahead(self) -> int:
        return self._step.num_replays_ahead

    def __call__(self, batches: Sequence[Batch], micro_step: int = 0) -> list[StepOutput]:
        self._backend._newest = self._step
        return self._of_host(self._step(batches, micro_step))  # type: ignore[arg-type]  # made by feed

    def feed_several(self, batches: Sequence[Sequence[Batch]]) -> list[list[Batch]]:
        return self._backend.feed_several(batches)

    def run_several(self, batches: Sequence[Sequence[Batch]], after_each: Callable[[], None],
                    ) -> list[list[StepOutput]] | None:
        assert isinstance(self._step, SeveralSteps)
        self._backend._newest = self._step
        outputs = self._step.run_several(batches, after_each)  # type: ignore[arg-type]  # made by feed
        return None if outputs is None else [self._of_host(of_step) for of_step in outputs]

    def publish(self, *, readable: bool = True) -> None:
        self._step.publish(readable=readable)

    def _of_host(self, outputs: list[StepOutput]) -> list[StepOutput]:
        return outputs if self._is_chief else [
            replace(output, tensors={}, functions=HostFunctions(hooks=output.functions.hooks), num_stacked=0)
            for output in outputs]
