"""The files of one checkpoint folder, written and read.

  model.safetensors       state dict of the module
  optimizer.safetensors   tensors of the optimizers
  state.json              versions, step, times, and all that is no tensor

They name nothing outside the folder, and nothing is ever unpickled.
"""

from __future__ import annotations

import importlib.metadata
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tpuspec.errors import CheckpointError

FORMAT_VERSION = 1
# The first tpuspec that reads FORMAT_VERSION; raise both together.
NEEDS_TPUSPEC = "0.1.0"
MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = "model.safetensors", "optimizer.safetensors", "state.json"
_VALUES = {"global_step": int, "saved_at_seconds": (int, float), "started_at_seconds": (int, float),
           "optimizers": dict, "extra": dict}


def is_complete(folder: Path) -> bool:
    """Whether the folder has all the files of a checkpoint."""
    return not folder.is_symlink() and all((folder / name).is_file() for name in (MODEL_FILE, OPTIMIZER_FILE,
                                                                                  STATE_FILE))


def write_files(folder: Path, values: Mapping[str, Any], model: Mapping[str, Tensor],
                optimizer: Mapping[str, Tensor]) -> None:
    """Writes a checkpoint into an empty folder.

    Args:
      folder: where.
      values: what state.json says besides the versions.
      model, optimizer: storable tensors.
    """
    versions = {"format_version": FORMAT_VERSION, "needs_tpuspec": NEEDS_TPUSPEC, "tpuspec_version": tpuspec_version()}
    state_file = folder / STATE_FILE
    state_file.write_text(json.dumps(versions | dict(values), allow_nan=False, indent=1), encoding="utf-8")
    for name, tensors in ((MODEL_FILE, model), (OPTIMIZER_FILE, optimizer)):
        save_file(dict(tensors), folder / name)
        # safetensors makes files that no other user may read.
        (folder / name).chmod(stat.S_IMODE(state_file.stat().st_mode))


def read_values(folder: Path) -> dict[str, Any]:
    """Reads and checks state.json.

    Raises:
      CheckpointError: the folder is no checkpoint, is damaged, or is of a later format.
    """
    try:
        text = (folder / STATE_FILE).read_bytes()
    except FileNotFoundError as error:
        what = f"has no {STATE_FILE}" if folder.is_dir() else "does not exist"
        raise CheckpointError(f"{str(folder)!r} is no checkpoint: it {what}. Give the path of a folder "
                              "checkpoint-<step>, such as latest_checkpoint() returns.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(folder)!r} is no checkpoint that can be read: {error}.") from error
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(folder / STATE_FILE, f"it is not valid JSON ({error})") from error
    if not isinstance(values, dict) or not isinstance(values.get("format_version"), int):
        raise CheckpointError(f"{str(folder)!r} is no checkpoint of tpuspec: its {STATE_FILE} has no format_version.")
    if values["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"The checkpoint {folder} needs tpuspec >= {values.get('needs_tpuspec', 'one that is newer')}: it has "
            f"format {values['format_version']}, and this is tpuspec {tpuspec_version()}, which reads format "
            f"{FORMAT_VERSION}.")
    for name, kind in _VALUES.items():
        if not isinstance(values.get(name), kind):
            raise _damaged(folder / STATE_FILE, f"{name} is missing or of a wrong type")
    return values


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
      CheckpointError: it is missing or damaged.
    """
    try:
        # Copies: load_file maps the file, and a mapped file that someone truncates kills the process.
        return {name: tensor.clone() for name, tensor in load_file(file).items()}
    except FileNotFoundError as error:
        raise CheckpointError(f"{str(file.parent)!r} is no complete checkpoint: it has no {file.name}.") from error
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise _damaged(file, str(error)) from error


def tpuspec_version() -> str:
    """The installed version, or the first one where tpuspec runs from its source."""
    try:
        return importlib.metadata.version("tpuspec")
    except importlib.metadata.PackageNotFoundError:
        return NEEDS_TPUSPEC


def _damaged(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"The checkpoint file {file} is damaged: {why}. Restore an earlier checkpoint.")
