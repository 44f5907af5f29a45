"""A checkpoint whose tensors stay where they are until a part of them is asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tpuspec.checkpoint.format import MODEL, OPTIMIZER
from tpuspec.checkpoint.index import Entry
from tpuspec.checkpoint.manifest import Manifest
from tpuspec.checkpoint.reader import Reader
from tpuspec.checkpoint.state import TrainingState, unpack
from tpuspec.errors import CheckpointError
from tpuspec.spec.pieces import Slices


class StoredCheckpoint:
    """The folder, opened while something is read: within a `with` block once for all.

    Args:
      path: of the checkpoint.
      manifest: as it was when its checksums were right.
    """

    def __init__(self, path: str | os.PathLike[str], manifest: Manifest) -> None:
        self._path, self._manifest = path, manifest
        self._held = contextlib.ExitStack()
        self._reader: Reader | None = None
        self._depth = 0

    def __enter__(self) -> Reader:
        if self._reader is None:
            reader = self._held.enter_context(Reader.open(self._path))
            if repr(reader.manifest) != repr(self._manifest):
                self._held.close()
                raise CheckpointError(f"The checkpoint {os.fspath(self._path)} was written anew while it was read.")
            self._reader = reader
        self._depth += 1
        return self._reader

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._reader = None
            self._held.close()


class StoredTensor:
    """A tensor of a checkpoint; see `tpuspec.spec.pieces.Stored`."""

    def __init__(self, source: StoredCheckpoint, entry: Entry) -> None:
        self._source, self._entry = source, entry
        self.shape, self.dtype = torch.Size(entry.shape), entry.dtype

    def numel(self) -> int:
        """Counts its elements."""
        return self.shape.numel()

    def read(self, index: Slices | None = None) -> Tensor:
        """Reads a part, or the whole."""
        bounds = [each.indices(size) for each, size in zip(
            index if index is not None else [slice(None)] * len(self.shape), self.shape, strict=True)]
        with self._source as reader:
            return reader.read_box(self._entry, [start for start, _, _ in bounds],
                                   [max(0, stop - start) for start, stop, _ in bounds])


def read_stored(path: str | os.PathLike[str], manifest: Manifest, *, optimizers: bool) -> TrainingState:
    """Reads a checkpoint but for its large tensors, which come as `StoredTensor`.

    Args:
      path: of the checkpoint.
      manifest: as it was when its checksums were right.
      optimizers: whether to read the optimizers' and the run's state.

    Raises:
      CheckpointError: it cannot be read.
    """
    source = StoredCheckpoint(path, manifest)
    with source as reader:
        model = {name: StoredTensor(source, entry) for name, entry in reader.entries(MODEL).items()}
        if not optimizers:
            return TrainingState(global_step=manifest.global_step, model=_small(model), source=source)
        tensors = {name: StoredTensor(source, entry) for name, entry in reader.entries(OPTIMIZER).items()}
        rest = unpack(reader.values(), tensors)
        return TrainingState(global_step=manifest.global_step, model=_small(model),
                             optimizers=_small(rest["optimizers"]), extra=read_all(rest["extra"]), source=source)


def read_all(tree: Any) -> Any:
    """Reads the stored tensors of a tree, whole."""
    return pytree.tree_map(lambda leaf: leaf.read() if isinstance(leaf, StoredTensor) else leaf, tree)


def read_whole(state: TrainingState) -> TrainingState:
    """Returns a state without stored tensors.

    Raises:
      CheckpointError: one cannot be read.
    """
    with state.source:
        return dataclasses.replace(state, model=read_all(state.model), optimizers=read_all(state.optimizers))


def _small(tree: Any) -> Any:
    """Reads those of one element at most, as counters are."""
    return pytree.tree_map(
        lambda leaf: leaf.read() if isinstance(leaf, StoredTensor) and leaf.numel() <= 1 else leaf, tree)
