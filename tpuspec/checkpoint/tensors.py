"""Tensors as a safetensors file: written from their own memory, and read straight into it, chunk by chunk.

safetensors' own writer and reader hide their system calls, so that neither a checksum nor a fault could get between
them, or copy bytes that are in memory already. The format is a line of JSON and the tensors' bytes. Tests hold both
ways to the library, byte for byte.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# In the order of the file: wide elements first, so that every tensor is aligned.
DTYPE_NAMES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64",
    torch.float32: "F32", torch.uint32: "U32", torch.int32: "I32",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16", torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_ORDER = {dtype: place for place, dtype in enumerate(DTYPE_NAMES)}
_ALIGNMENT = 8
_LENGTH_BYTES = 8


def encode_tensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yields a safetensors file: its header, then each tensor's bytes, without a copy.

    Args:
      tensors: name -> host tensor, contiguous, of a dtype in DTYPE_NAMES.
    """
    names = sorted(tensors, key=lambda name: (_ORDER[tensors[name].dtype], name))
    header: dict[str, object] = {}
    start = 0
    for name in names:
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        if tensors[name].numel():
            yield bytes_of(tensors[name])


def split_shards(tensors: Mapping[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    """Deals tensors out to shards of at most `max_bytes`, in their order; a larger tensor is a shard of its own."""
    shards: list[dict[str, Tensor]] = [{}]
    num_bytes = 0
    for name, tensor in tensors.items():
        if shards[-1] and num_bytes + tensor.nbytes > max_bytes:
            shards.append({})
            num_bytes = 0
        shards[-1][name] = tensor
        num_bytes += tensor.nbytes
    return shards


def read_tensors(fill: Callable[[memoryview], None], size: int) -> dict[str, Tensor]:
    """Reads the tensors of a safetensors file, each straight into memory of its own.

    Args:
      fill: reads the next bytes of the file, as many as the buffer has.
      size: bytes of the file.

    Raises:
      ValueError: it is no such file; no more memory was taken than the file has bytes.
    """
    header, names = read_header(fill, size)
    tensors = {}
    for entry in header:
        tensors[entry.name] = torch.empty(entry.shape, dtype=entry.dtype)
        if entry.stop > entry.start:
            fill(bytes_of(tensors[entry.name]))
    return {name: tensors[name] for name in names}


class HeaderEntry(NamedTuple):
    """A tensor of a file: its dtype and shape, its first byte, and the one after its last."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(fill: Callable[[memoryview], None], size: int) -> tuple[list[HeaderEntry], list[str]]:
    """Reads where the tensors of a safetensors file lie.

    Args:
      fill, size: as in `read_tensors`.

    Returns:
      The tensors in the order of their bytes; their names in the order of the header.

    Raises:
      ValueError: it is no such file.
    """
    found, num_bytes = _parse_header(fill, size)
    first, end = size - num_bytes, 0
    for name, dtype, shape, start, stop in (entries := sorted(found, key=lambda entry: entry[3:])):
        # Each begins where the one before ends, as in every valid file: none overlaps, none lies outside.
        if start != end or stop > num_bytes:
            raise ValueError(f"{name!r} has bytes {start} to {stop}, behind {end} of {num_bytes}")
        sides = all(type(side) is int and side >= 0 for side in shape)
        if not sides or math.prod(shape) * dtype.itemsize != stop - start:
            raise ValueError(f"{name!r}, {dtype} {list(shape)}, does not have {stop - start} bytes")
        end = stop
    if end != num_bytes:
        raise ValueError(f"its tensors have {end} bytes, and the file {num_bytes}")
    return [entry._replace(start=entry.start + first, stop=entry.stop + first) for entry in entries], [
        entry.name for entry in found]


def _parse_header(fill: Callable[[memoryview], None], size: int) -> tuple[list[HeaderEntry], int]:
    """Returns the tensors, with bytes counted after the header, and the bytes of all of them."""
    if size < _LENGTH_BYTES:
        raise ValueError(f"it has {size} bytes")
    length_bytes = bytearray(_LENGTH_BYTES)
    fill(memoryview(length_bytes))
    length = int.from_bytes(length_bytes, "little")
    if length > size - _LENGTH_BYTES:
        raise ValueError(f"its header claims {length} bytes, and the file has {size}")
    text = bytearray(length)
    fill(memoryview(text))
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = []
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            entries.append(HeaderEntry(name, DTYPES[entry["dtype"]], tuple(entry["shape"]), operator.index(start),
                                       operator.index(stop)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header is none: {type(error).__name__} {error}") from error
    return entries, size - _LENGTH_BYTES - length


def bytes_of(tensor: Tensor) -> memoryview:
    """Returns the memory of a contiguous host tensor, which has elements."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
