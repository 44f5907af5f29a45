"""Tensors as a safetensors file: written chunk by chunk from their own memory, read as views of the file's bytes.

safetensors' own writer hides its system calls, so that neither a checksum nor a fault could get between them, and its
reader copies each tensor of bytes that are in memory already. The format is a line of JSON and the tensors' bytes.
Tests hold both ways to the library, byte for byte.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tpuspec.errors import CheckpointError

# In the order of the file: wide elements first, so that every tensor is aligned.
DTYPE_NAMES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64",
    torch.float32: "F32", torch.uint32: "U32", torch.int32: "I32",
    torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16", torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
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
            yield tensors[name].detach().reshape(-1).view(torch.uint8).numpy().data


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


def decode_tensors(content: Tensor, where: str) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file; they are views of `content`, so that nothing large is copied.

    Args:
      content: bytes of the file, uint8 [size], in memory that nothing else uses.
      where: path of the file, for errors.

    Raises:
      CheckpointError: it is none.
    """
    try:
        header, data = _split(content)
        tensors, end = {}, 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            # Each begins where the one before ends, as in every valid file: none overlaps, none lies outside.
            if start != end:
                raise ValueError(f"{name!r} begins at byte {start} in place of {end}")
            tensors[name] = _tensor(data[start:stop], _DTYPES[entry["dtype"]], entry["shape"], stop - start)
            end = stop
        if end != len(data):
            raise ValueError(f"its tensors have {end} bytes, and the file {len(data)}")
        return {name: tensors[name] for name in header}
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"The checkpoint file {where} is damaged: it is no safetensors file that this version "
                              f"reads ({error}). Restore an earlier checkpoint.") from error


def _split(content: Tensor) -> tuple[dict[str, Any], Tensor]:
    length = int.from_bytes(content[:_LENGTH_BYTES].numpy().tobytes(), "little")
    if len(content) < _LENGTH_BYTES or length > len(content) - _LENGTH_BYTES:
        raise ValueError(f"its header claims {length} bytes, and the file has {len(content)}")
    data = _LENGTH_BYTES + length
    header = json.loads(content[_LENGTH_BYTES:data].numpy().tobytes())
    header.pop("__metadata__", None)
    return header, content[data:]


def _tensor(data: Tensor, dtype: torch.dtype, shape: list[int], num_bytes: int) -> Tensor:
    if any(type(size) is not int or size < 0 for size in shape) or math.prod(shape) * dtype.itemsize != num_bytes:
        raise ValueError(f"{dtype} {shape} does not have {num_bytes} bytes")
    if not num_bytes:
        return torch.empty(shape, dtype=dtype)
    if len(data) != num_bytes:
        raise ValueError(f"{num_bytes} bytes lie outside the file")
    # torch.set_rng_state, among others, takes bytes for a struct, and dies where they are not aligned for it. What is
    # not aligned for its own dtype was written by others.
    if dtype.itemsize == 1 or data.data_ptr() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).reshape(shape)
