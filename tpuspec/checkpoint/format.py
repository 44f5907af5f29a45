"""The files of one checkpoint folder, as they are written; `reader` reads them.

  model.safetensors       state dict of the module; model-00001-of-00003.safetensors and so on where it is large
  optimizer.safetensors   tensors of the optimizers, and of the run's other state; likewise
  state.json              all that is no tensor
  manifest.json           step, times, size and checksum of each file; written last, so that a folder with one is whole

Where no process has the whole state, process-00000-model-00001.safetensors and so on take the place of the first two,
a set for each process, and index.json says which of them has which piece of which tensor.

They name nothing outside the folder, and nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tpuspec.checkpoint.index import Part
from tpuspec.checkpoint.manifest import INDEX_FILE, MANIFEST_FILE, NEEDS_TPUSPEC, FileEntry, Manifest, encode_manifest
from tpuspec.checkpoint.tensors import encode_tensors, split_shards
from tpuspec.files.disk import WriteFile

MODEL, OPTIMIZER, STATE_FILE = "model", "optimizer", "state.json"
MAX_SHARD_BYTES = 5_000_000_000


def write_files(write_file: WriteFile, manifest: Manifest, values: Mapping[str, Any], model: Mapping[str, Tensor],
                optimizer: Mapping[str, Tensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> Manifest:
    """Writes a checkpoint into an empty folder, each file through to the disk, the manifest last; returns that.

    Args:
      write_file: makes a file of the folder.
      manifest: step and times; the files and is_finite are filled in.
      values: what state.json says.
      model, optimizer: storable tensors.
      max_shard_bytes: of a file of tensors; a larger tensor has a file of its own.
    """
    files = {}
    for part, tensors in ((MODEL, model), (OPTIMIZER, optimizer)):
        shards = split_shards(tensors, max_shard_bytes)
        for number, shard in enumerate(shards, start=1):
            name = f"{part}-{number:05}-of-{len(shards):05}" if len(shards) > 1 else part
            written = write_file(f"{name}.safetensors", encode_tensors(shard))
            files[f"{name}.safetensors"] = FileEntry(size=written.size, crc32=written.crc32)
    return _write_rest(write_file, dataclasses.replace(manifest, files=files, is_finite=is_finite(model)), values)


def write_index(write_file: WriteFile, manifest: Manifest, values: Mapping[str, Any], part: Part) -> Manifest:
    """Writes what makes the files of several processes a checkpoint, the manifest last; returns that.

    Args:
      write_file: makes a file of the folder.
      manifest: as in `write_files`.
      values: what state.json says.
      part: what all of them wrote.

    Raises:
      CheckpointError: the pieces of a tensor are not the whole.
    """
    part.check()
    text = Part(tensors=part.tensors, is_finite=part.is_finite).encode().encode()
    written = write_file(INDEX_FILE, [text])
    files = part.files | {INDEX_FILE: FileEntry(size=written.size, crc32=written.crc32)}
    return _write_rest(write_file, dataclasses.replace(manifest, files=files, is_finite=part.is_finite), values)


def _write_rest(write_file: WriteFile, manifest: Manifest, values: Mapping[str, Any]) -> Manifest:
    text = json.dumps(dict(values), allow_nan=False, indent=1).encode()
    written = write_file(STATE_FILE, [text])
    files = manifest.files | {STATE_FILE: FileEntry(size=written.size, crc32=written.crc32)}
    whole = dataclasses.replace(manifest, files=files)
    write_file(MANIFEST_FILE, [encode_manifest(whole)])
    return whole


def is_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether no number is NaN or infinite."""
    # Such a number makes every sum such a one, and a sum takes a fraction of the time; but a sum may overflow as well.
    return all(_has_finite_sum(tensor) or bool(tensor.isfinite().all())
               for tensor in tensors.values() if tensor.is_floating_point())


def _has_finite_sum(tensor: Tensor) -> bool:
    if tensor.dtype not in (torch.float32, torch.float64):
        return False
    with np.errstate(all="ignore"):
        # By numpy: torch's sum takes all cores, which the training needs that goes on meanwhile.
        return bool(np.isfinite(tensor.numpy().sum()))


def tpuspec_version() -> str:
    """The installed version, or the first one where tpuspec runs from its source."""
    try:
        return importlib.metadata.version("tpuspec")
    except importlib.metadata.PackageNotFoundError:
        return NEEDS_TPUSPEC
