"""Plain PyTorch on a CPU or a GPU, for `use_tpu=False`: one process alone, or torchrun's, with a replica each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tpuspec.config import RunConfig
from tpuspec.errors import DeviceError, SpecError
from tpuspec.hosts import tree_codec
from tpuspec.hosts.alone import Alone
from tpuspec.hosts.environment import read_local_rank
from tpuspec.hosts.process_group import NetworkCoordinator, join, joined
from tpuspec.hosts.same_start import start_from_chief
from tpuspec.native.checksums import checksums
from tpuspec.native.gradients import sum_gradients
from tpuspec.placement import module_as_before, move_module
from tpuspec.spec.backend import CompiledStep, Replica, RngState, StepFunction, Topology
from tpuspec.spec.coordinator import Coordinator
from tpuspec.spec.phase import in_phase
from tpuspec.spec.results import Batch, HostFunctions, StepOutput
from tpuspec.spec.train_op import reduce_with

T = TypeVar("T")


class NativeBackend:
    """One replica a process; every step runs eagerly, alone in any shape.

    Args:
      device: 'cpu', or 'cuda' with its number.
      group: the other processes; None alone.
      compile_model: whether torch.compile compiles the module.
    """

    step_kind = "eager"
    static_shapes = False
    split_state = None
    coordinator: Coordinator = Alone()
    _device = torch.device("cpu")
    _group: NetworkCoordinator | None = None
    _compile_model = False

    def __init__(self, device: torch.device | None = None, group: NetworkCoordinator | None = None, *,
                 compile_model: bool = False) -> None:
        self._device = device or torch.device("cpu")
        self._compile_model = compile_model
        self.topology = Topology(
            platform=self._device.type.upper(), devices=(str(self._device),), num_replicas_per_host=1,
            num_hosts=group.num_hosts if group else 1, host_index=group.host_index if group else 0,
            reason="use_tpu=False: plain PyTorch")
        if group is not None:
            self._group = self.coordinator = group
            # All processes must bring host tensors of one shape together: short batches are padded, as on XLA.
            self.static_shapes = True

    @classmethod
    def start(cls, config: RunConfig) -> NativeBackend:
        """Finds the device, and joins the other processes if torchrun started several.

        Raises:
          DeviceError: no GPU, or the other processes cannot be reached.
          ConfigError: the environment says too little.
        """
        cluster = config.cluster
        device = find_device(config.device or "cpu")
        # Those of a TPU pod have met already: there this backend evaluates for an XLA one.
        group = join(config, device) if cluster.num_workers > 1 else joined()
        return cls(device, group, compile_model=config.compile)

    def place(self, model: nn.Module | None) -> list[Replica]:
        """Returns the one replica around the module itself; all processes start from the chief's values.

        Raises:
          SpecError: the processes built different modules.
        """
        if model is not None:
            start_from_chief(model, self.coordinator)
            move_module(model, self._device)
            if self._compile_model:
                model.compile()
        return [Replica(ordinal=self.topology.host_index, device=self._device, model=model,
                        global_step=torch.zeros(1, dtype=torch.int64, device=self._device))]

    def seed(self, seed: int) -> None:
        """Seeds torch's random state; each process has its own, so that dropout differs between replicas."""
        torch.manual_seed(seed + self.topology.host_index)

    def rng_state(self) -> RngState:
        """Reads torch's random state."""
        devices: tuple[int, ...] = ()
        if self._device.type == "cuda":
            devices = (int.from_bytes(bytes(torch.cuda.get_rng_state(self._device).tolist()), "little"),)
        return RngState(host=torch.get_rng_state(), devices=devices)

    def set_rng_state(self, state: RngState) -> None:
        """Puts torch's random state back."""
        torch.set_rng_state(state.host)
        if self._device.type == "cuda" and state.devices:
            size = torch.cuda.get_rng_state(self._device).numel()
            torch.cuda.set_rng_state(
                torch.tensor(list(state.devices[0].to_bytes(size, "little")), dtype=torch.uint8), self._device)

    def feed(self, batches: Sequence[Batch]) -> list[Batch]:
        """Copies the tensors: the input may use its memory again before the host half reads it."""
        if self._device.type == "cuda":
            return [batch.map(lambda tensor: tensor.pin_memory().to(self._device, non_blocking=True))
                    for batch in batches]
        return [batch.map(torch.clone) for batch in batches]

    def compile_step(self, step: StepFunction, replicas: Sequence[Replica], *, num_at_once: int = 1) -> CompiledStep:
        """Wraps the step; nothing is compiled, and steps run one at a time."""
        return EagerStep(backend=self, step=step, replicas=tuple(replicas), group=self._group)

    def rehearse(self, replica: Replica, fn: Callable[[], T]) -> T:
        """Runs `fn`, then puts buffers and random state back."""
        random_state = self.rng_state()
        try:
            with module_as_before(replica.model), in_phase("model_fn"):
                return fn()
        finally:
            self.set_rng_state(random_state)

    def fetch(self, tree: T) -> T:
        """Returns the structure with its tensors on the host."""
        if self._device.type == "cpu":
            return tree
        return pytree.tree_map(lambda leaf: leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf, tree)

    def keeping_statistics(self, *, whole: bool) -> contextlib.AbstractContextManager[None]:
        """Each process has one replica, whose buffers the session keeps."""
        return contextlib.nullcontext()

    def statistics(self) -> dict[str, Tensor]:
        """There is one replica in a process."""
        return {}

    def set_statistics(self, replica: Replica, statistics: Mapping[str, Tensor]) -> None:
        """There is one replica in a process."""

    def sums_of_parameters(self, replicas: Sequence[Replica]) -> list[Tensor]:
        """Returns the sums of values and of sizes of the parameters."""
        return self.fetch([checksums(replica.model) for replica in replicas if replica.model is not None])

    def reduce_gradients(self, optimizer: torch.optim.Optimizer, reduction: str) -> None:
        """Reduces the gradients over all processes, at once, and applies them."""
        if self._group is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
            sum_gradients(parameters, self._group.collectives.all_reduce,
                          scale=1 / self._group.num_hosts if reduction == "mean" else 1.0)
        optimizer.step()

    def constrain(self, tensor: Tensor, axes: Sequence[Any]) -> Tensor:
        """Returns the tensor: there is no mesh."""
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Returns the tensor over all replicas along axis 0."""
        if self._group is None:
            return tensor
        size = tensor.shape[0]
        whole = tensor.new_zeros((size * self.topology.num_replicas, *tensor.shape[1:]))
        first = size * self.topology.host_index
        whole[first:first + size] = tensor.detach()
        self._group.collectives.all_reduce(whole, "gather a tensor in the step")
        return whole


def find_device(kind: str) -> torch.device:
    """Returns this process's device: the CPU, or the GPU of its LOCAL_RANK.

    Raises:
      DeviceError: there is no such GPU.
    """
    if kind == "cpu":
        return torch.device("cpu")
    count, local = torch.cuda.device_count(), read_local_rank()
    if local >= count:
        raise DeviceError("device='cuda' needs a GPU for each process of this machine; this one is number "
                          f"{local}, and torch {torch.__version__} finds {count} GPUs. Start fewer processes, or take "
                          "device='cpu'.")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@dataclass(slots=True, kw_only=True)
class EagerStep:
    """Runs the step at once, and brings its host tensors to the chief.

    Attributes:
      backend: of the step.
      step: the step.
      replicas: the local replica.
      group: the other processes; None alone.
    """

    backend: NativeBackend
    step: StepFunction
    replicas: tuple[Replica, ...]
    group: NetworkCoordinator | None = None
    _skeleton: Any = field(default=None, init=False)

    def __call__(self, batches: Sequence[Batch], micro_step: int = 0) -> list[StepOutput]:
        """Runs one step on each replica's batch; the chief gets the outputs of all replicas, the others none."""
        with reduce_with(self.backend), in_phase("model_fn"):
            outputs = [self.step(replica, batch, micro_step)
                       for replica, batch in zip(self.replicas, batches, strict=True)]
        return outputs if self.group is None else self._to_chief(outputs[0], self.group)

    def publish(self, *, readable: bool = True) -> None:
        """State is always readable."""

    def _to_chief(self, output: StepOutput, group: NetworkCoordinator) -> list[StepOutput]:
        skeleton, tensors = tree_codec.encode(dict(output.tensors))
        if self._skeleton is None:
            others = group.exchange(skeleton, name="shapes of host tensors")
            if others[0] != skeleton:
                raise SpecError(f"host tensors must have the same shapes and dtypes on every host; got {skeleton} on "
                                f"host {group.host_index} and {others[0]} on the chief.")
            self._skeleton = skeleton
        elif skeleton != self._skeleton:
            raise SpecError("host tensors must keep their shapes and dtypes where several hosts compute together; got "
                            f"{skeleton} after {self._skeleton}.")
        device = tensors[0].device if tensors else torch.device("cpu")
        parts = group.collectives.gather(tree_codec.to_bytes(tensors, device))
        if parts is None:
            return [replace(output, tensors={}, functions=HostFunctions(hooks=output.functions.hooks))]
        specs = tree_codec.tensor_specs(skeleton)
        return [replace(output, tensors=tree_codec.decode(skeleton, tree_codec.from_bytes(part, specs)))
                for part in parts]
