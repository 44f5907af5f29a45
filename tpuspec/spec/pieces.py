"""Tensors that no host has whole: the pieces that one has of them, and values that are read a piece at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Slices = Sequence[slice]
"""One a dimension, with steps of 1."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a tensor.

    Attributes:
      offsets: where it begins, one a dimension.
      tensor: its values, on the host.
    """

    offsets: tuple[int, ...]
    tensor: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """What one host has of a tensor; the pieces of all hosts are the whole, each of its values once.

    Attributes:
      shape: of the whole.
      dtype: of all pieces.
      pieces: of this host, perhaps none.
    """

    shape: torch.Size
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the pieces."""
        return sum(piece.tensor.nbytes for piece in self.pieces)


class Stored(Protocol):
    """A tensor of a checkpoint, of which as much is read as is asked for.

    Attributes:
      shape, dtype: of the whole.
    """

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def read(self, index: Slices | None = None) -> Tensor:
        """Reads a part to the host, the whole without `index`.

        Raises:
          CheckpointError: it cannot be read.
        """
        ...


def is_cover(shape: Sequence[int], boxes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> bool:
    """Whether parts of a tensor, each of (offsets, shape), lie within it and have each of its values once."""
    if any(len(offsets) != len(shape) or len(size) != len(shape) for offsets, size in boxes):
        return False
    if any(not 0 <= start <= start + num <= whole
           for offsets, size in boxes for start, num, whole in zip(offsets, size, shape, strict=True)):
        return False
    filled = [box for box in boxes if math.prod(box[1])]
    return sum(math.prod(size) for _, size in filled) == math.prod(shape) and not _overlap(filled)


def _overlap(boxes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> bool:
    ordered = sorted(boxes, key=lambda box: tuple(box[0]))
    for number, (offsets, size) in enumerate(ordered):
        for others, other_size in ordered[number + 1:]:
            if others and others[0] >= offsets[0] + size[0]:  # nor do those after it
                break
            if all(a < b + m and b < a + n for a, n, b, m in zip(offsets, size, others, other_size, strict=True)):
                return True
    return False


def whole(tensor: Tensor) -> Pieces:
    """Returns a tensor that a host has whole as the one piece of it."""
    return Pieces(tensor.shape, tensor.dtype, (Piece((0,) * tensor.ndim, tensor),))

