"""TPU chips that are not there: programs are compiled for them by libtpu, and nothing runs."""

from __future__ import annotations

import contextlib
import ctypes
import fnmatch
import functools
import importlib.metadata
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import torch
from jax.experimental import topologies
from torch import Tensor

from tpuspec.engine.compile_cache import cache_passed_over
from tpuspec.engine.compiled_text import count_collectives, largest_temporaries, refusing_place
from tpuspec.engine.devices import OneDevice, Replicas
from tpuspec.engine.executable import lower_loop, lower_step
from tpuspec.engine.mesh import DeviceMesh
from tpuspec.errors import ConfigError, DeviceError
from tpuspec.spec.engine import CompiledFacts, Layout, Run
from tpuspec.spec.phase import in_phase

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
"""Options of mallopt, as malloc.h numbers them."""


class TopologyEngines:
    """The chips of a TPU topology, and engines on them; see `spec.engine.EngineFactory` for the verbs.

    Args:
      name: as 'v5e:2x2', a generation and the chips along each side.

    Attributes:
      kind: of a chip, as jax names it.
      compiler: libtpu with its version.
      other_compiler: the libtpu that goes with this jax on a TPU, where that is another one; "" else.
      num_chips: of the topology.
      engine: the one that was made.

    Raises:
      ConfigError: libtpu knows no such topology.
      DeviceError: libtpu is not there.
    """

    engine: _Planned | None = None

    def __init__(self, name: str) -> None:
        _return_memory()
        try:
            with _beside_others():
                self._devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
        except Exception as error:
            text = str(error).splitlines()[0]
            if "libtpu" in text.lower() or isinstance(error, FileNotFoundError):
                raise DeviceError("mode=plan compiles with libtpu, which is not installed. Install the extra "
                                  "tpuspec[plan].") from error
            raise ConfigError(f"topology {name!r} is none that libtpu knows: {text.rstrip('.')}. Name a generation and "
                              "the chips along each side, such as v5e:2x2, v5e:4x4, v6e:2x2, v5p:2x2x1.") from error
        self.kind: str = self._devices[0].device_kind
        self.compiler, self.other_compiler = _compilers()
        self.num_chips = math.prod(int(side) for side in name.partition(":")[2].split("x"))

    def compile_newest(self) -> CompiledFacts:
        """Compiles the newest program of the engine; returns what the compiler says of it, for one device."""
        assert self.engine is not None, "the backend makes it"
        return self.engine.compile_newest()

    def num_devices(self) -> int:
        """Counts the devices: a chip of some generations is two."""
        return len(self._devices)

    def make(self, num_replicas: int) -> OneDevice:
        """Returns the engine of so many replicas, a device each."""
        engine = _OneDevice(self._devices[:1]) if num_replicas == 1 else _Replicas(self._devices[:num_replicas])
        self.engine = engine
        return engine

    def make_mesh(self, axes: Mapping[str, int], parts: Sequence[Sequence[int]] = ()) -> DeviceMesh:
        """Returns the engine of a mesh of all devices."""
        self.engine = engine = _DeviceMesh(self._devices, axes, parts)
        engine.splits_state = False  # one process plans for all
        return engine


def _compilers() -> tuple[str, str]:
    """Returns the libtpu that compiles here, and the one that jax asks for where that is another one, else ''."""
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:  # it lies elsewhere: TPU_LIBRARY_PATH
        return "a libtpu of an unknown version", ""
    asked = next((each.partition(";")[0].strip() for each in importlib.metadata.requires("jax") or ()
                  if each.startswith("libtpu==")), "")
    fits = fnmatch.fnmatchcase(f"libtpu=={version}", asked or "*")
    return f"libtpu {version}", "" if fits else asked


def _return_memory() -> None:
    """Lets glibc give what the compiler frees back to the system: a large program takes a third less at its peak."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        set_option = ctypes.CDLL(None).mallopt
        for option, value in ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, 1 << 16), (_TRIM_THRESHOLD, 1 << 17)):
            set_option(option, value)


@contextlib.contextmanager
def _beside_others() -> Iterator[None]:
    """Lets libtpu start though another process has it, which may hold chips, and not look for chips of this machine."""
    asked = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
             "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
    before = {name: os.environ.get(name) for name in asked}
    os.environ.update(asked)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Planned(OneDevice):
    """An engine whose arrays are shapes with places: it runs no program, and compiles the newest one when asked."""

    has_values = False
    _newest: tuple[Callable[[], Any], list[int]] | None = None

    def compile_newest(self) -> CompiledFacts:
        """Compiles the newest program; returns what the compiler says of it, for one device."""
        assert self._newest is not None, "a step comes first"
        lower, argument_bytes = self._newest
        begun = time.perf_counter()
        try:
            with in_phase("compile"), jax.enable_x64(True), cache_passed_over():
                compiled = lower().compile()
        except jax.errors.JaxRuntimeError as error:
            return CompiledFacts(argument_bytes=argument_bytes, seconds=time.perf_counter() - begun, reason=str(error),
                                 place=refusing_place(str(error)))
        memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis() or {}, compiled.as_text() or ""
        return CompiledFacts(
            argument_bytes=argument_bytes, output_bytes=memory.output_size_in_bytes,
            aliased_bytes=memory.alias_size_in_bytes, temporary_bytes=memory.temp_size_in_bytes,
            program_bytes=memory.generated_code_size_in_bytes, flops=cost.get("flops", 0.0),
            accessed_bytes=cost.get("bytes accessed", 0.0), collectives=count_collectives(text),
            temporaries=largest_temporaries(text), seconds=time.perf_counter() - begun)

    def put(self, tensors: Sequence[Tensor], layouts: Sequence[Layout] | None = None) -> list[Any]:
        return [self._like(tensor, layout)
                for tensor, layout in zip(tensors, layouts or [Layout()] * len(tensors), strict=True)]

    def put_stacked(self, tensors: Sequence[Tensor]) -> list[Any]:
        return self.put([tensor[0] for tensor in tensors], [Layout(is_own=True)] * len(tensors))

    def of_batches(self, batches: Sequence[Sequence[Tensor]], layouts: Sequence[Layout]) -> list[Any]:
        return self.put(batches[0], layouts)

    def own(self, values: Sequence[Any]) -> Any:
        return self.put([torch.from_numpy(values[0].reshape(1))[0]], [Layout(is_own=True)])[0]

    def stack(self, arrays: Sequence[Any]) -> Any:
        return arrays[0]  # only programs say what they take

    def fetch(self, arrays: Sequence[Any]) -> list[Tensor]:
        """Returns tensors of their shapes without values."""
        return [torch.empty(array.shape, dtype=_OF_TORCH[str(array.dtype)], device="meta") for array in arrays]

    def fetch_whole(self, arrays: Sequence[Any]) -> list[Tensor]:
        return [tensor[0] if self._is_stacked(array) else tensor
                for array, tensor in zip(arrays, self.fetch(arrays), strict=True)]

    def sums(self, arrays: Sequence[Any]) -> Tensor:
        return torch.zeros(0, len(arrays), 2)

    def compile(self, program: bytes, donated: Sequence[int], given: Sequence[Layout], made: Sequence[Layout],
                num_kept: int = 0) -> Run:
        exported = self._exported(program)
        with jax.enable_x64(True):
            forms = self._forms(exported, given)
        lower = functools.partial(lower_step, self._function(exported, given, made), forms, donated,
                                  self._places(exported, made, num_kept))
        outputs = self._outputs(exported, made)
        facts = lower, [_bytes_of(form.shape, form.dtype, form.place) for form in forms]

        def run(inputs: Sequence[Any]) -> list[Any]:
            self._newest = facts
            return outputs

        return run

    def compile_loop(self, program: bytes, num_steps: int, carried: Sequence[tuple[int, int]], stacked: Sequence[int],
                     given: Sequence[Layout], made: Sequence[Layout]) -> Run | None:
        exported = self._exported(program)
        with jax.enable_x64(True):
            forms = self._forms(exported, given)
        loop = functools.partial(
            lower_loop, self._function(exported, given, made), forms, num_steps, carried, stacked, len(made),
            self._places(exported, made, len(carried)), self._places(exported, made, len(carried), stacked=True))
        outputs = self._outputs(exported, made)
        sizes = [_bytes_of(form.shape, form.dtype, form.place) * (num_steps if place in set(stacked) else 1)
                 for place, form in enumerate(forms)]

        def run(inputs: Sequence[Any]) -> list[Any]:
            self._newest = (lambda: loop()[0]), sizes
            return outputs

        return run

    def _outputs(self, exported: Any, made: Sequence[Layout]) -> list[Any]:
        return [jax.ShapeDtypeStruct(self._shape(tuple(aval.shape), layout), aval.dtype, sharding=self._place(layout))
                for aval, layout in zip(exported.out_avals, made, strict=True)]

    def _like(self, tensor: Tensor, layout: Layout) -> Any:
        return jax.ShapeDtypeStruct(self._shape(tuple(tensor.shape), layout), _TO_JAX[tensor.dtype],
                                    sharding=self._place(layout))

    def _is_stacked(self, array: Any) -> bool:
        return self.num_replicas > 1 and array.sharding == self._place(Layout(is_own=True))


class _OneDevice(_Planned):
    pass


class _Replicas(_Planned, Replicas):
    pass


class _DeviceMesh(_Planned, DeviceMesh):
    pass


_TO_JAX: dict[torch.dtype, Any] = {
    dtype: jax.numpy.bfloat16 if dtype is torch.bfloat16 else torch.empty(0, dtype=dtype).numpy().dtype
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
                  torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128)}
_OF_TORCH = {str(jax.numpy.dtype(dtype)): own for own, dtype in _TO_JAX.items()}


def _bytes_of(shape: Sequence[int], dtype: Any, place: Any) -> int:
    """Returns the bytes of an array on one device."""
    return math.prod(place.shard_shape(tuple(shape))) * jax.numpy.dtype(dtype).itemsize
