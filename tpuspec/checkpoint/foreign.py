"""Named tensors of files that another program wrote: safetensors, one file or several under an index, and torch.save.

No tensor of a safetensors file is read before it is asked for.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tpuspec.checkpoint.manifest import MANIFEST_FILE
from tpuspec.checkpoint.store import CheckpointStore
from tpuspec.checkpoint.tensors import HeaderEntry, bytes_of, read_header
from tpuspec.errors import CheckpointError
from tpuspec.files.location import is_remote

INDEX_SUFFIX, SUFFIX = ".safetensors.index.json", ".safetensors"
_IN_FOLDERS = ("model.safetensors.index.json", "model.safetensors", "weights.safetensors")
_OF_TORCH = (".pt", ".pth", ".bin", ".ckpt")
_STATE_DICTS = ("state_dict", "model_state_dict", "model")
"""Under which names people keep a state dict beside other things."""


class NamedTensor(Protocol):
    """A tensor that may not be read yet.

    Attributes:
      shape, dtype: as it is stored.
    """

    shape: torch.Size
    dtype: torch.dtype

    def read(self) -> Tensor:
        """Reads it to the host."""
        ...


@contextlib.contextmanager
def open_tensors(location: str | os.PathLike[str]) -> Iterator[Mapping[str, NamedTensor]]:
    """Opens what holds the weights of a model, and yields its tensors by name; they are read within the block.

    Args:
      location: a checkpoint of tpuspec, a model_dir, an export, a safetensors file, an index of several or a folder
        with one of these, or a file of torch.save.

    Raises:
      CheckpointError: it is none of these, or damaged.
    """
    with contextlib.ExitStack() as held:
        yield _tensors_of(location, held)


def _tensors_of(location: str | os.PathLike[str], held: contextlib.ExitStack) -> Mapping[str, NamedTensor]:
    path = Path(location)
    if not is_remote(location):
        if not path.exists():
            raise CheckpointError(f"{os.fspath(location)!r} does not exist: there is nothing to start from.")
        if path.is_dir():
            found = next((path / name for name in _IN_FOLDERS if (path / name).is_file()), None)
            if found is None or (path / MANIFEST_FILE).exists():
                return _of_checkpoint(location, held)
            path = found
        if path.name.endswith(INDEX_SUFFIX):
            return _of_index(path, held)
        if path.suffix == SUFFIX:
            return dict(_of_safetensors(path, held))
        if path.suffix in _OF_TORCH:
            return _of_torch(path)
        if path.is_file():
            raise CheckpointError(f"{str(path)!r} is of no known kind: give a file *{SUFFIX}, *{INDEX_SUFFIX}, or a "
                                  f"state dict of torch.save, *{', *'.join(_OF_TORCH)}.")
    return _of_checkpoint(location, held)


def _of_checkpoint(location: str | os.PathLike[str], held: contextlib.ExitStack) -> Mapping[str, NamedTensor]:
    store = CheckpointStore(location)
    if not is_remote(location) and (Path(location) / MANIFEST_FILE).exists():
        path = location
    elif (path := held.enter_context(store.reading_latest())) is None:
        raise CheckpointError(f"{os.fspath(location)!r} has nothing to start from: neither a checkpoint of tpuspec nor "
                              f"{' or '.join(_IN_FOLDERS)}.")
    store.verify(path)
    state = store.load_stored(path, optimizers=False)
    held.enter_context(state.source)
    return {name: _Whole(value) if isinstance(value, Tensor) else value for name, value in state.model.items()}


def _of_index(path: Path, held: contextlib.ExitStack) -> Mapping[str, NamedTensor]:
    try:
        files: dict[str, str] = dict(json.loads(path.read_bytes())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{str(path)!r} is no index of safetensors files, which has a 'weight_map': "
                              f"{type(error).__name__}: {error}") from error
    tensors: dict[str, NamedTensor] = {}
    for file in dict.fromkeys(files.values()):
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{str(path)!r} names {file!r}, which is no file beside it.")
        if not (path.parent / file).is_file():
            raise CheckpointError(f"{str(path)!r} names {file!r}, which is not there: {path.parent} is incomplete.")
        tensors |= _of_safetensors(path.parent / file, held)
    if missing := files.keys() - tensors.keys():
        raise CheckpointError(f"{str(path)!r} names {min(missing)!r} in {files[min(missing)]!r}, which has no such "
                              "tensor.")
    return tensors


def _of_safetensors(path: Path, held: contextlib.ExitStack) -> dict[str, NamedTensor]:
    file = _File(path)
    try:
        file.open(held)
        entries, _ = read_header(file.fill, file.size)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} is no safetensors file that can be read: {error}") from error
    return {entry.name: _InFile(file, entry) for entry in entries}


class _File:
    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, held: contextlib.ExitStack) -> None:
        self._file = held.enter_context(self.path.open("rb", buffering=0))
        self.size = os.fstat(self._file.fileno()).st_size

    def fill(self, buffer: memoryview) -> None:
        while buffer:
            num_read = self._file.readinto(buffer)
            if not num_read:
                raise ValueError("it ends too early")
            buffer = buffer[num_read:]

    def read(self, start: int, into: Tensor) -> None:
        try:
            self._file.seek(start)
            self.fill(bytes_of(into))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{str(self.path)!r} cannot be read: {error}") from error


class _InFile:
    def __init__(self, file: _File, entry: HeaderEntry) -> None:
        self._file, self._entry = file, entry
        self.shape, self.dtype = torch.Size(entry.shape), entry.dtype

    def read(self) -> Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype)
        if tensor.numel():
            self._file.read(self._entry.start, tensor)
        return tensor


class _Whole:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def read(self) -> Tensor:
        return self._tensor


def _of_torch(path: Path) -> Mapping[str, NamedTensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{str(path)!r} holds other things than tensors, which are not unpickled. Save the state "
                              "dict alone: torch.save(model.state_dict(), path).") from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} is no file of torch.save that can be read: {error}") from error
    for name in _STATE_DICTS:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    tensors = {str(name): _Whole(value.detach()) for name, value in found.items()
               if isinstance(value, Tensor)} if isinstance(found, Mapping) else {}
    if not tensors:
        raise CheckpointError(f"{str(path)!r} holds no state dict, a dict of tensors by name, neither by itself nor as "
                              f"{' or '.join(map(repr, _STATE_DICTS))}.")
    return tensors
