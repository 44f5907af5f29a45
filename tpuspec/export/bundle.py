"""The files of one export, written and read; one folder holds them all.

- export.json: signatures, programs, global step, and size and checksum of every file; written last
- weights.safetensors: parameters and buffers, shared by all programs
- serve.pt2: the program for CPUs and GPUs, with the tags {serve}
- serve_tpu.pt2: the program for XLA devices, with the tags {serve, tpu}
- assets.extra: files that were added
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Self

import numpy as np
import torch

from tpuspec.errors import ConfigError, ConfigTypeError, ExportError
from tpuspec.export.program import ServingProgram
from tpuspec.export.signature import Signature, TensorSpec
from tpuspec.files.disk import WriteFile
from tpuspec.spec.json_numbers import NOT_FINITE, json_number

FORMAT_VERSION = 1
METADATA_FILE, WEIGHTS_FILE, ASSETS_FOLDER = "export.json", "weights.safetensors", "assets.extra"
SERVE, TPU = "serve", "tpu"
CPU_TAGS, TPU_TAGS = frozenset({SERVE}), frozenset({SERVE, TPU})
PROGRAM_FILES = {CPU_TAGS: "serve.pt2", TPU_TAGS: "serve_tpu.pt2"}
_ASSET_PART = re.compile(r"[\w][\w.\- ]{0,99}")
_PART_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """What export.json says.

    Attributes:
      global_step: of the weights.
      metrics: what an evaluation of them gave; {} where it is not known.
      inputs: what the server receives, by name; the program takes a single one named 'input' as a bare tensor if
        `single_input`.
      single_input: whether it takes one tensor, and not a dict.
      signatures: by name.
      programs: tags -> file.
      files: name -> (size, CRC-32).
      torch_version: that traced the programs.
    """

    global_step: int
    metrics: Mapping[str, Any]
    inputs: Mapping[str, TensorSpec]
    single_input: bool
    signatures: Mapping[str, Signature]
    programs: Mapping[frozenset[str], str]
    files: Mapping[str, tuple[int, int]]
    torch_version: str

    def encode(self) -> bytes:
        """Returns the file."""
        return json.dumps({
            "format_version": FORMAT_VERSION, "torch_version": self.torch_version, "global_step": self.global_step,
            "metrics": _as_data(self.metrics, "metrics"),
            "programs": [{"tags": sorted(tags), "file": file} for tags, file in self.programs.items()],
            "inputs": {name: spec.as_json() for name, spec in self.inputs.items()}, "single_input": self.single_input,
            "signatures": {name: signature.as_json() for name, signature in self.signatures.items()},
            "files": {name: {"size": size, "crc32": crc32} for name, (size, crc32) in self.files.items()},
        }, indent=1, allow_nan=False).encode() + b"\n"

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads an export's metadata.

        Raises:
          ExportError: the folder is no export, or one of a later format.
        """
        path = folder / METADATA_FILE
        try:
            body = json.loads(path.read_bytes())
            if body["format_version"] > FORMAT_VERSION:
                raise ExportError(f"{folder} has format {body['format_version']}, and this tpuspec reads "
                                  f"{FORMAT_VERSION}. Load it with a later tpuspec.")
            return cls(
                global_step=int(body["global_step"]), metrics=_from_data(body["metrics"]),
                torch_version=str(body["torch_version"]),
                inputs={name: TensorSpec.from_json(entry) for name, entry in body["inputs"].items()},
                single_input=bool(body["single_input"]),
                signatures={name: Signature.from_json(entry) for name, entry in body["signatures"].items()},
                programs={frozenset(entry["tags"]): str(entry["file"]) for entry in body["programs"]},
                files={name: (entry["size"], entry["crc32"]) for name, entry in body["files"].items()})
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ExportError(f"{str(folder)!r} is no export: it has no {METADATA_FILE}. Give the folder that "
                              "Trainer.export returned, <base>/<timestamp>.") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ExportError(f"{path} cannot be read: {type(error).__name__}: {error}. Export again.") from error


def write_bundle(write_file: WriteFile, *, programs: Mapping[frozenset[str], ServingProgram],
                 weights: Iterable[bytes | memoryview], assets: Mapping[str, Path], single_input: bool,
                 global_step: int, metrics: Mapping[str, Any]) -> None:
    """Writes an export's files, the metadata last.

    Args:
      write_file: makes a file.
      programs: by tags, with equal inputs and signatures.
      weights: the safetensors file.
      assets: name below assets.extra -> file to copy.
      single_input: whether the programs take one tensor.
      global_step, metrics: see `Metadata`.
    """
    written = {WEIGHTS_FILE: write_file(WEIGHTS_FILE, weights)}
    for tags, program in programs.items():
        written[PROGRAM_FILES[tags]] = write_file(PROGRAM_FILES[tags], [program.content])
    for name, source in assets.items():
        written[f"{ASSETS_FOLDER}/{name}"] = write_file(f"{ASSETS_FOLDER}/{name}", _read_parts(source))
    one = next(iter(programs.values()))
    write_file(METADATA_FILE, [Metadata(
        global_step=global_step, metrics=metrics, inputs=one.inputs, single_input=single_input,
        signatures=one.signatures, torch_version=torch.__version__,
        programs={tags: PROGRAM_FILES[tags] for tags in programs},
        files={name: (file.size, file.crc32) for name, file in written.items()}).encode()])


def check_assets(assets: Mapping[str, Any] | None) -> dict[str, Path]:
    """Returns the files to add, by their place below assets.extra.

    Raises:
      ConfigError, ConfigTypeError: as `check_asset_places`, or a file does not exist.
    """
    checked = check_asset_places(assets)
    for name, source in checked.items():
        if not source.is_file():
            raise ConfigError(f"assets_extra[{name!r}] is no file: {source}.")
    return checked


def check_asset_places(assets: Mapping[str, Any] | None) -> dict[str, Path]:
    """Returns the files to add, by their place below assets.extra; they need not exist yet.

    Raises:
      ConfigTypeError: no dict, or a file that is no path.
      ConfigError: a place leaves the folder.
    """
    if assets is not None and not isinstance(assets, Mapping):
        raise ConfigTypeError("assets_extra must be a dict of places below assets.extra to files; got "
                              f"{type(assets).__name__}.")
    checked = {}
    for name, source in (assets or {}).items():
        parts = PurePosixPath(name).parts if isinstance(name, str) else ()
        if not parts or name != "/".join(parts) or not all(_ASSET_PART.fullmatch(part) for part in parts):
            raise ConfigError("assets_extra maps places below assets.extra, such as 'vocabulary/words.txt', to files; "
                              f"got {name!r}.")
        if not isinstance(source, str | os.PathLike):
            raise ConfigTypeError(f"assets_extra[{name!r}] must be the path of a file; got {source!r}.")
        checked[name] = Path(source)
    return checked


def check_metrics(metrics: Any) -> Mapping[str, Any]:
    """Returns the metrics to keep; {} for None.

    Raises:
      ConfigTypeError: no dict, a name that is no str, or a value that JSON cannot hold.
      ConfigError: a text that stands for a number.
    """
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise ConfigTypeError(f"metrics must be a dict, as evaluate() returns it; got {type(metrics).__name__}.")
    _as_data(metrics, "metrics")
    return metrics


def checked_path(folder: Path, name: str, metadata: Metadata) -> Path:
    """Returns the path of a file, every byte of which was checked.

    Raises:
      ExportError: it is missing, or its bytes have changed.
    """
    size = crc32 = 0
    try:
        for part in _read_parts(folder / name):
            size, crc32 = size + len(part), zlib.crc32(part, crc32)
    except OSError as error:
        raise ExportError(f"the export {folder} is damaged: {name} cannot be read ({error}). Export again.") from error
    if (size, crc32) != metadata.files.get(name):
        raise ExportError(f"the export {folder} is damaged: checksum mismatch in {name}. Export again.")
    return folder / name


def _as_data(value: Any, place: str) -> Any:
    """Returns metrics as JSON has them: arrays become lists, and NaN and infinity their names."""
    if isinstance(value, Mapping):
        if other := [key for key in value if not isinstance(key, str)]:
            raise ConfigTypeError(f"names in {place} must be str; got {other[0]!r}.")
        return {key: _as_data(item, f"{place}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_data(item, place) for item in value]
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return _as_data(value.tolist(), place)
    if isinstance(value, float):
        return json_number(value)
    if isinstance(value, str) and value in NOT_FINITE:
        raise ConfigError(f"{place} must not be the text {value!r}, which stands for a number in {METADATA_FILE}. Give "
                          f"float({value!r}), or another text.")
    if value is not None and not isinstance(value, int | float | str):
        raise ConfigTypeError(f"{place} must be a number, a text, an array, or a list or dict of them; got "
                              f"{type(value).__name__}.")
    return value


def _from_data(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _from_data(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_data(item) for item in value]
    return float(value) if value in NOT_FINITE else value


def _read_parts(source: Path) -> Iterator[bytes]:
    with source.open("rb") as file:
        while part := file.read(_PART_BYTES):
            yield part
