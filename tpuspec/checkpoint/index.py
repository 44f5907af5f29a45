"""The index of a checkpoint that several processes wrote: which file has which piece of which tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from tpuspec.checkpoint.manifest import FileEntry
from tpuspec.checkpoint.tensors import DTYPE_NAMES, DTYPES, encode_tensors, split_shards
from tpuspec.errors import CheckpointError
from tpuspec.files.disk import WriteFile
from tpuspec.spec.pieces import Pieces, is_cover


@dataclass(frozen=True, slots=True)
class StoredPiece:
    """A part of a tensor in a file, where it has the name `key`."""

    file: str
    key: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(slots=True)
class Entry:
    """A tensor: its dtype, its whole shape, and its pieces."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: list[StoredPiece] = field(default_factory=list)


@dataclass(slots=True)
class Part:
    """What one process wrote, or several.

    Attributes:
      files: name -> size and checksum.
      tensors: MODEL and OPTIMIZER -> name -> entry.
      is_finite: whether no number of the model is NaN or infinite.
    """

    files: dict[str, FileEntry] = field(default_factory=dict)
    tensors: dict[str, dict[str, Entry]] = field(default_factory=dict)
    is_finite: bool = True

    def encode(self) -> str:
        """Returns it as JSON."""
        return json.dumps({
            "is_finite": self.is_finite,
            "files": {name: [entry.size, entry.crc32] for name, entry in self.files.items()},
            "tensors": {part: {name: {
                "dtype": DTYPE_NAMES[entry.dtype], "shape": entry.shape,
                "pieces": [[piece.file, piece.key, piece.offsets, piece.shape] for piece in entry.pieces]}
                for name, entry in entries.items()} for part, entries in self.tensors.items()}}, ensure_ascii=False)

    @classmethod
    def decode(cls, text: str | bytes | bytearray) -> Self:
        """Reads what `encode` wrote.

        Raises:
          ValueError: it is none.
        """
        try:
            body = json.loads(text)
            return cls(
                files={name: FileEntry(size=size, crc32=crc32) for name, (size, crc32) in body["files"].items()},
                tensors={part: {name: _decode_entry(entry) for name, entry in entries.items()}
                         for part, entries in body["tensors"].items()},
                is_finite=body["is_finite"])
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"it is no index: {type(error).__name__} {error}") from error

    def add(self, other: Part) -> None:
        """Adds what another process wrote.

        Raises:
          CheckpointError: both wrote a file of one name, or have a tensor in other shapes or dtypes.
        """
        if twice := self.files.keys() & other.files.keys():
            raise CheckpointError(f"Two processes wrote the file {min(twice)} of a checkpoint.")
        self.files |= other.files
        self.is_finite &= other.is_finite
        for part, entries in other.tensors.items():
            own = self.tensors.setdefault(part, {})
            for name, entry in entries.items():
                mine = own.setdefault(name, Entry(entry.dtype, entry.shape))
                if (mine.dtype, mine.shape) != (entry.dtype, entry.shape):
                    raise CheckpointError(f"Two processes have {name!r} as {mine.dtype} {list(mine.shape)} and "
                                          f"{entry.dtype} {list(entry.shape)}; their models must be the same.")
                mine.pieces += entry.pieces

    def check(self) -> None:
        """Checks that the pieces of each tensor are the whole.

        Raises:
          CheckpointError: they are not; names the first one.
        """
        for entries in self.tensors.values():
            for name, entry in entries.items():
                if not is_cover(entry.shape, [(piece.offsets, piece.shape) for piece in entry.pieces]):
                    raise CheckpointError(f"The pieces of {name!r}, {list(entry.shape)}, are not the whole tensor.")


def _decode_entry(entry: Mapping[str, Any]) -> Entry:
    return Entry(DTYPES[entry["dtype"]], tuple(entry["shape"]), [
        StoredPiece(file, key, tuple(offsets), tuple(shape)) for file, key, offsets, shape in entry["pieces"]])


def write_part(write_file: WriteFile, number: int, tensors: Mapping[str, Mapping[str, Pieces]], max_bytes: int) -> Part:
    """Writes the pieces that one process has, a set of files of its own.

    Args:
      write_file: makes a file of the checkpoint.
      number: of the process.
      tensors: MODEL and OPTIMIZER -> name -> pieces.
      max_bytes: of a file; a larger piece has a file of its own.

    Returns:
      What was written; is_finite is True.
    """
    written = Part(tensors={part: {} for part in tensors})
    for part, named in tensors.items():
        pieces: dict[str, Tensor] = {}
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, value in named.items():
            written.tensors[part][name] = Entry(value.dtype, tuple(value.shape))
            for piece in value.pieces:
                key = f"{name}@{','.join(map(str, piece.offsets))}"
                pieces[key], found[key] = piece.tensor, (name, piece.offsets)
        for count, shard in enumerate(_filled(split_shards(pieces, max_bytes)), start=1):
            file = f"process-{number:05}-{part}-{count:05}.safetensors"
            size = write_file(file, encode_tensors(shard))
            written.files[file] = FileEntry(size=size.size, crc32=size.crc32)
            for key, tensor in shard.items():
                name, offsets = found[key]
                written.tensors[part][name].pieces.append(StoredPiece(file, key, offsets, tuple(tensor.shape)))
    return written


def _filled(shards: Sequence[dict[str, Tensor]]) -> Iterable[dict[str, Tensor]]:
    return (shard for shard in shards if shard)
