"""The devices that programs run on: one, or one for each replica."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch
from jax import export
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torch import Tensor

from tpuspec.engine.arrays import fetch, host_array
from tpuspec.engine.collectives import over_replicas
from tpuspec.engine.executable import Form, as_exported, compile_loop, compile_step, has_convolutions, num_compiles
from tpuspec.errors import DeviceError
from tpuspec.spec.engine import Run
from tpuspec.spec.phase import in_phase

_REPLICA = "replica"


class OneDevice:
    """One PJRT device; see `spec.engine.Engine` for the verbs.

    Args:
      devices: the first one is taken.
    """

    num_replicas = 1

    def __init__(self, devices: Sequence[Any]) -> None:
        self._devices = list(devices)
        # As jax.export names it; a device says 'gpu'.
        self._platform: str = "cuda" if devices[0].platform == "gpu" else devices[0].platform

    @property
    def num_compiles(self) -> int:
        """Programs that this process has compiled."""
        return num_compiles()

    def put(self, tensors: Sequence[Tensor], own: Sequence[bool] | None = None) -> list[Any]:
        """Copies host tensors to the devices; each replica gets its own copy of those that are its own."""
        if not tensors:
            return []
        owned = own or [False] * len(tensors)
        with jax.enable_x64(True):
            return jax.device_put([self._copies(host_array(tensor), is_own) for tensor, is_own in
                                   zip(tensors, owned, strict=True)], [self._place(is_own) for is_own in owned])

    def of_batches(self, batches: Sequence[Sequence[Tensor]]) -> list[Any]:
        """Copies the batches of the replicas into inputs of one run."""
        (tensors,) = batches
        arrays = [host_array(tensor) for tensor in tensors]
        if self._platform == "cpu":
            return arrays
        with jax.enable_x64(True):
            return jax.device_put(arrays, self._place(True))

    def own(self, values: Sequence[Any]) -> Any:
        """Returns an input that is every replica's own, of one number each."""
        return values[0]

    def stack(self, arrays: Sequence[Any]) -> Any:
        """Returns inputs of several steps as one, [len(arrays), ...]."""
        if all(isinstance(array, np.ndarray) for array in arrays):
            return np.stack(arrays)
        with jax.enable_x64(True):
            return jax.numpy.stack(list(arrays))

    def fetch(self, arrays: Sequence[Any]) -> list[Tensor]:
        """Copies arrays to the host."""
        return fetch(arrays)

    def fetch_whole(self, arrays: Sequence[Any]) -> list[Tensor]:
        """As `fetch`: there is one replica."""
        return fetch(arrays)

    def sums(self, arrays: Sequence[Any]) -> Tensor:
        """Returns the sums of values and of sizes of arrays, float32 [1, arrays, 2]."""
        return fetch([_sums(arrays)[None]])[0]

    def compile(self, program: bytes, donated: Sequence[int], given: Sequence[bool], made: Sequence[bool]) -> Run:
        """Compiles a StableHLO program."""
        exported = self._exported(program)
        with in_phase("compile"), jax.enable_x64(True):
            return compile_step(self._function(exported, given, made), self._forms(exported, given), donated)

    def compile_loop(self, program: bytes, num_steps: int, carried: Sequence[tuple[int, int]], stacked: Sequence[int],
                     given: Sequence[bool], made: Sequence[bool]) -> Run | None:
        """Compiles a loop of several steps; None on a CPU for convolutions, which have one thread within a loop there.

        They would be slower so, and have other last bits.
        """
        if self._platform == "cpu" and has_convolutions(program):
            return None
        exported = self._exported(program)
        with in_phase("compile"), jax.enable_x64(True):
            return compile_loop(self._function(exported, given, made), self._forms(exported, given), len(made),
                                num_steps, carried, stacked)

    def _exported(self, program: bytes) -> export.Exported:
        return as_exported(program, self._platform)

    def _function(self, exported: export.Exported, given: Sequence[bool], made: Sequence[bool],
                  ) -> Callable[..., Any]:
        return exported.call

    def _forms(self, exported: export.Exported, given: Sequence[bool]) -> list[Form]:
        """Returns shape, dtype and place of each input."""
        return [Form(tuple(aval.shape), aval.dtype, self._place(is_own), self._place(is_own, stacked=True))
                for aval, is_own in zip(exported.in_avals, given, strict=True)]

    def _copies(self, array: Any, is_own: bool) -> Any:
        return array

    def _place(self, is_own: bool, *, stacked: bool = False) -> Any:
        return jax.sharding.SingleDeviceSharding(self._devices[0])


class Replicas(OneDevice):
    """A device for each replica. What each has for itself is an array [number of replicas, ...]."""

    def __init__(self, devices: Sequence[Any]) -> None:
        super().__init__(devices)
        self.num_replicas = len(devices)
        self._mesh = Mesh(np.array(devices), (_REPLICA,))
        self._sums: Callable[..., Any] | None = None

    def of_batches(self, batches: Sequence[Sequence[Tensor]]) -> list[Any]:
        """Copies the batches of the replicas into inputs of one run, each to its device."""
        arrays = [np.stack([host_array(tensor) for tensor in tensors]) for tensors in zip(*batches, strict=True)]
        with jax.enable_x64(True):
            return jax.device_put(arrays, self._place(True))

    def own(self, values: Sequence[Any]) -> Any:
        """Returns an input that is every replica's own, of one number each."""
        return np.stack(values)

    def fetch_whole(self, arrays: Sequence[Any]) -> list[Tensor]:
        """As `fetch`, for one replica: of what each has for itself the mean, or the first one's whole numbers."""
        return [_mean(tensor) if _is_own(array) else tensor
                for array, tensor in zip(arrays, fetch(arrays), strict=True)]

    def sums(self, arrays: Sequence[Any]) -> Tensor:
        """Returns for each replica the sums of values and of sizes of arrays, float32 [num_replicas, arrays, 2]."""
        if self._sums is None:
            self._sums = jax.jit(jax.shard_map(
                lambda *arrays: _sums(arrays)[None], mesh=self._mesh, in_specs=PartitionSpec(),
                out_specs=PartitionSpec(_REPLICA), check_vma=False))
        return fetch([self._sums(*arrays)])[0]

    def _exported(self, program: bytes) -> export.Exported:
        return as_exported(over_replicas(program, self.num_replicas), self._platform)

    def _function(self, exported: export.Exported, given: Sequence[bool], made: Sequence[bool],
                  ) -> Callable[..., Any]:
        def of_replica(*inputs: Any) -> tuple[Any, ...]:
            outputs = exported.call(*(each[0] if is_own else each for each, is_own in zip(inputs, given, strict=True)))
            return tuple(each[None] if is_own else each for each, is_own in zip(outputs, made, strict=True))

        def specs(owned: Sequence[bool]) -> tuple[PartitionSpec, ...]:
            return tuple(PartitionSpec(_REPLICA) if is_own else PartitionSpec() for is_own in owned)

        # Not checked: that what is not a replica's own is equal on all of them is what `loops.drift` looks after.
        return jax.shard_map(of_replica, mesh=self._mesh, in_specs=specs(given), out_specs=specs(made),
                             check_vma=False)

    def _forms(self, exported: export.Exported, given: Sequence[bool]) -> list[Form]:
        return [form._replace(shape=(self.num_replicas, *form.shape)) if is_own else form
                for form, is_own in zip(super()._forms(exported, given), given, strict=True)]

    def _copies(self, array: Any, is_own: bool) -> Any:
        return np.broadcast_to(np.asarray(array), (self.num_replicas, *array.shape)) if is_own else array

    def _place(self, is_own: bool, *, stacked: bool = False) -> Any:
        axes = [_REPLICA] if is_own else []
        return NamedSharding(self._mesh, PartitionSpec(*([None] if stacked else []), *axes))


def _is_own(array: Any) -> bool:
    return isinstance(array, jax.Array) and isinstance(array.sharding, NamedSharding) and (
        _REPLICA in array.sharding.spec)


def _mean(tensor: Tensor) -> Tensor:
    """Returns the mean over the first dim, of whole numbers the first."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor[0].clone()
    wide = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
    return wide.mean(0).to(tensor.dtype)


def _sums(arrays: Sequence[Any]) -> Any:
    values = [jax.numpy.stack([each.real, each.imag]) if jax.numpy.iscomplexobj(each) else each for each in arrays]
    wide = [each.astype(jax.numpy.float32) for each in values]
    return jax.numpy.stack([jax.numpy.stack([each.sum(), abs(each).sum()]) for each in wide])


class Engines:
    """The devices of a platform on this host, and engines on them.

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
        """Returns the engine of so many replicas, a device each.

        Raises:
          DeviceError: there are fewer devices, or the platform cannot be started.
        """
        devices = self._devices()
        if len(devices) < num_replicas:
            raise DeviceError(
                f"jax's client of this process already runs with {len(devices)} {self._platform} devices; "
                f"{num_replicas} are wanted. Set CPU_NUM_DEVICES, or make the Trainer with the most shards, before the "
                "first use of jax in the process.")
        return OneDevice(devices[:1]) if num_replicas == 1 else Replicas(devices[:num_replicas])

    def _devices(self) -> list[Any]:
        if self._name == "cpu":
            with contextlib.suppress(RuntimeError):  # the client runs
                jax.config.update("jax_num_cpu_devices", int(os.environ.get("CPU_NUM_DEVICES", "1")))
        try:
            return jax.local_devices(backend=self._name)
        except RuntimeError as error:
            raise DeviceError(
                f"PJRT_DEVICE={self._platform} cannot be started: {str(error).splitlines()[0].rstrip('.')}. "
                "Set PJRT_DEVICE=CPU to run without an accelerator.") from error
