"""Tensors as a safetensors file: written chunk by chunk from their own memory, read by the safetensors library.

safetensors' own writer hides its system calls, so that neither a checksum nor a fault could get between them; its
format is a line of JSON and the tensors' bytes. A test holds this writer to the library's, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch
from safetensors import SafetensorError, deserialize
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


def decode_tensors(content: bytes, where: str) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file, in memory of their own.

    Raises:
      CheckpointError: it is none.
    """
    try:
        found = deserialize(content)
        return {name: _tensor(entry["data"], _DTYPES[entry["dtype"]], entry["shape"]) for name, entry in found}
    except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"The checkpoint file {where} is damaged: it is no safetensors file that this version "
                              f"reads ({error}). Restore an earlier checkpoint.") from error


def _tensor(data: bytearray, dtype: torch.dtype, shape: list[int]) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(shape)
