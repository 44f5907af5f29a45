"""The private calls of torch_xla 2.9 that capture and replay a graph, each under the name of what it does.

Source: torch_xla/_dynamo/dynamo_bridge.py, which uses the same calls.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_xla
import torch_xla.core.xla_builder as xb
import torch_xla.core.xla_model as xm
from torch import Tensor
from torch_xla._dynamo.dynamo_bridge import alias_with_buffer_donor_config

from tpuspec.spec.phase import in_phase

_C = torch_xla._XLAC

# torch_xla gives host tensors of equal values one device buffer. A state that was sent so could not be donated.
_C._set_xla_enable_device_data_cache(False)

_SEED_ADD, _SEED_FACTOR, _SEED_MODULUS = 1012031, 7012063, 1 << 64
_DRAW_ADD, _DRAW_FACTOR = 2531011, 214013

_SMALL_BYTES = 1 << 18

_READ_OF_NOTHING = ("Unexpected execution happens", "Trying to access XLA data")
"""What torch_xla says where a value is read that nothing may compute, or that there is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphInput:
    """One input of a pending graph.

    Attributes:
      tensor_id: of the tensor that first used the data; -1 where the data belongs to none, as a Python number's.
      handle: of the device buffer.
      value: the data as a tensor.
    """

    tensor_id: int
    handle: int
    value: Tensor


@contextlib.contextmanager
def scalars_shared() -> Iterator[None]:
    """Gives Python numbers of equal values one input of a graph within the block, in place of one each."""
    _C._set_xla_enable_device_data_cache(True)
    try:
        yield
    finally:
        _C._set_xla_enable_device_data_cache(False)


def send(tensors: Sequence[Tensor], device: str) -> list[Tensor]:
    """Copies host tensors to a device in one call."""
    return _C._xla_tensors_from_aten(list(tensors), [device] * len(tensors), None) if tensors else []


def send_apart(tensors: Sequence[Tensor], device: str) -> list[Tensor]:
    """Copies host tensors to a device, each into a buffer of its own, also within `scalars_shared`."""
    is_shared = _C._get_xla_enable_device_data_cache()
    _C._set_xla_enable_device_data_cache(False)
    try:
        return send(tensors, device)
    finally:
        _C._set_xla_enable_device_data_cache(is_shared)


def send_copy(tensor: Tensor, device: str) -> Tensor:
    """Returns a device tensor of the same values, with a buffer of its own."""
    (copied,) = send(fetch([tensor]), device)
    return copied


def computed(tensor: Tensor) -> Tensor:
    """Returns a pending tensor of the same values: one that is an output of the graph, with a buffer of its own."""
    return torch.logical_or(tensor, tensor) if tensor.dtype is torch.bool else tensor.detach().mul(1)


_fetching = threading.RLock()


def fetch(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies device tensors to the host in one transfer; runs what is pending behind them."""
    if not tensors:
        return []
    with _fetching:
        return _C._xla_get_cpu_tensors(list(tensors))


@contextlib.contextmanager
def nothing_fetched() -> Iterator[None]:
    """Keeps other threads from fetching, so that what `num_reads` counts within the block is this thread's."""
    with _fetching:
        yield


def num_reads() -> int:
    """Counts what was copied from devices to the host, by whatever call."""
    found = _C._xla_metric_data("TransferFromDeviceTime")
    return found[0] if found else 0


def use_device(device: str) -> None:
    """Makes a device the one that 'xla' means."""
    _C._xla_set_default_device(device)


def handles(tensors: Sequence[Tensor]) -> list[int]:
    """Returns the device buffer behind each tensor; none may be pending. Waits for the programs under way."""
    # Until its program has run, a tensor has a stand-in for its buffer, of another address.
    _C._xla_wait_device_ops([])
    return _C._get_tensors_handle(list(tensors)) if tensors else []


def tensor_id(tensor: Tensor) -> int:
    """Returns the number that a graph's inputs name their tensors by."""
    return _C._xla_get_tensor_id(tensor)


def pending(tensors: Sequence[Tensor]) -> list[bool]:
    """Tells for each tensor whether its value is still to be computed."""
    return _C._check_tensor_need_materialization(list(tensors)) if tensors else []


def waiting(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns those whose values are still to be computed."""
    return [tensor for tensor, is_pending in zip(tensors, pending(tensors), strict=True) if is_pending]


def make_gone(like: Sequence[Tensor], device: str) -> list[Tensor]:
    """Returns tensors of the shapes and dtypes of others whose buffers are gone: reading one is an error."""
    kinds: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for number, tensor in enumerate(like):
        kinds.setdefault((tensor.shape, tensor.dtype), []).append(number)
    made: list[Tensor] = [torch.empty(0)] * len(like)
    for (shape, dtype), numbers in kinds.items():
        (lost,) = send([torch.zeros(shape, dtype=dtype)], device)
        for number in numbers:
            made[number] = _C._get_tensors_xla_device_data_node([lost])[1][0]
        donate([inner(lost)])
        result = computed(lost)
        inputs = graph_inputs([result])
        run(compile_graph([result]), [found.value for found in inputs])
        _C._clear_pending_irs(device)
    return made


def placeholders(like: Sequence[Tensor], device: str) -> list[Tensor]:
    """Returns device tensors of the shapes and dtypes of others, which graphs are traced with and do not run on.

    Large ones have no memory; to read one is an error, and ends the process where XLA computes on the host instead.
    """
    small = [number for number, tensor in enumerate(like) if tensor.nbytes <= _SMALL_BYTES]
    sent = dict(zip(small, send_apart([torch.zeros(like[number].shape, dtype=like[number].dtype) for number in small],
                                      device), strict=True))
    return [sent[number] if number in sent else xb.create_placeholder_tensor(tensor.shape, tensor.dtype)
            for number, tensor in enumerate(like)]


@contextlib.contextmanager
def nothing_runs(note: Callable[[BaseException], BaseException]) -> Iterator[None]:
    """Lets the block trace only: what reads a value within it is an error.

    Args:
      note: makes the error that is raised from torch_xla's own.
    """
    allow_execution(False)
    try:
        yield
    except RuntimeError as error:
        if not any(told in str(error) for told in _READ_OF_NOTHING):
            raise
        raise note(error) from error
    finally:
        allow_execution(True)


def scope(name: str) -> Any:
    """Names the operations that are traced from here on, until what is returned is gone."""
    return _C.profiler.scope_pusher(name)


@contextlib.contextmanager
def noting_lines() -> Iterator[None]:
    """Notes for each operation that is traced within the block which line of Python code asks for it."""
    before = _C._get_ir_debug()
    _C._set_ir_debug(True)
    try:
        yield
    finally:
        _C._set_ir_debug(before)


def num_pending(device: str) -> int:
    """Counts the live tensors of a device whose values are still to be computed."""
    return sum(_C._check_device_tensor_need_materialization(device))


def host_ops() -> dict[str, int]:
    """Counts, by name, what torch_xla has computed on the host of this process, as XLA has no such operation."""
    return {name.removeprefix("aten::"): _C._xla_counter_value(name) for name in _C._xla_counter_names()
            if name.startswith("aten::")}


def materialize(tensors: Sequence[Tensor], device: str) -> None:
    """Runs what is pending behind some tensors; does not wait for it."""
    if tensors:
        _C._xla_sync_multi(list(tensors), [device], False, True)


def end_step() -> bool:
    """Dispatches all that is pending as a step, and does not wait for it; returns whether it had to be compiled."""
    num_compiled = num_compiles()
    torch_xla.sync()
    return num_compiles() != num_compiled


def num_compiles() -> int:
    """Counts the graphs that this process has compiled."""
    return _C._xla_counter_value("UncachedCompile") or 0


def graph_inputs(roots: Sequence[Tensor]) -> list[GraphInput]:
    """Returns the inputs of the graph behind pending tensors, in the graph's order."""
    ids, values = _C._get_tensors_xla_device_data_node(list(roots))
    return [GraphInput(tensor_id=number, handle=handle, value=value)
            for number, handle, value in zip(ids, handles(values), values, strict=True)]


def has_collectives(roots: Sequence[Tensor]) -> bool:
    """Whether what is pending behind some tensors computes with other replicas."""
    return "cross_replica" in (text := _C._get_xla_tensors_text(list(roots))) or "all_" in text


def held(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns tensors that keep the buffers of others alive, which are not pending, whatever is written to those."""
    return _C._get_tensors_xla_device_data_node(list(tensors))[1] if tensors else []


def forget_dtypes(tensors: Sequence[Tensor]) -> None:
    """Lets tensors that are not pending be as a program's outputs are, so that their graphs have one hash.

    One that came by `Tensor.to` or an operation also keeps the dtype that torch knows it by, and `sum` writes it down.
    """
    ids, values = _C._get_tensors_xla_device_data_node(list(tensors)) if tensors else ([], [])
    known = dict(zip(ids, values, strict=True))
    for tensor in tensors:
        if (value := known.get(tensor_id(tensor))) is not None:
            publish(tensor, inner(value))


def seed_id() -> int:
    """Returns the tensor_id under which a graph names its random seed."""
    return _C._get_seed_info_id()


def donate(values: Sequence[Tensor]) -> None:
    """Gives the buffers of some inputs to the next graph, which may write its outputs there; they are gone then."""
    for value in values:
        _C._set_buffer_donation(value, True)


def graph_hash(roots: Sequence[Tensor]) -> bytes:
    """Returns a hash of the graph behind pending tensors: of what it computes, not of what it is given."""
    return _C._get_graph_hash(list(roots))


def stablehlo(roots: Sequence[Tensor]) -> bytes:
    """Returns the graph behind pending tensors as a portable StableHLO artifact."""
    return xm.get_stablehlo_bytecode(list(roots))  # type: ignore[arg-type]  # it takes a list


def compile_graph(roots: Sequence[Tensor]) -> bytes:
    """Compiles the graph behind pending tensors, unless it is known, and returns its hash; nothing runs."""
    with alias_with_buffer_donor_config(), in_phase("compile"):
        graph = _C._get_graph_hash(list(roots))
        _C._xla_warm_up_cache(list(roots), [])
    return graph


def forget_pending(device: str) -> None:
    """Drops what is pending on a device; tensors that were pending hold no value until one is published."""
    _C._clear_pending_irs(device)
    _C._set_all_reduce_token(device, None)


run = _C._run_cached_graph
"""run(hash, inputs) -> outputs: launches a compiled graph and does not wait for it."""


def inner(tensor: Tensor) -> Tensor:
    """Returns the XLA tensor that a torch tensor stands for now; in-place updates replace it by another one."""
    return torch._from_functional_tensor(tensor)


def publish(tensor: Tensor, value: Tensor) -> None:
    """Lets a torch tensor stand for another XLA tensor, for every reader (`_replace_xla_tensor` would not)."""
    torch._functionalize_replace(tensor, value)
    torch._functionalize_commit_update(tensor)


def next_seed(seed: int) -> int:
    """Returns the seed of the step after the one with `seed`, as torch_xla's step marker makes it."""
    return (_SEED_ADD + _SEED_FACTOR * seed) % _SEED_MODULUS


def seed_after_draw(seed: int) -> int:
    """Returns the state of a step's generator after a draw, as torch_xla makes it."""
    return (_DRAW_ADD + _DRAW_FACTOR * seed) % _SEED_MODULUS


def read_seed(value: Tensor) -> int:
    """Reads a seed that is a graph's input."""
    return int(fetch([value])[0].item()) % _SEED_MODULUS


def get_seed(device: str) -> int:
    """Reads the seed of a device's next step."""
    return xm.get_rng_state(device)


def set_seed(seed: int, device: str) -> None:
    """Sets the seed of a device's next step."""
    xm.set_rng_state(seed, device)


def allow_execution(allowed: bool) -> None:
    """Refuses, or allows again, that reading a pending value runs its graph."""
    _C._set_allow_execution(allowed)
