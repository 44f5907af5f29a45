"""What a run leaves beside its checkpoints: its resolved settings and the environment. Written, never read back."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import fsspec

from tpuspec.errors import ConfigError
from tpuspec.files.location import is_remote

CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
_PACKAGES = ("torch", "torch_xla", "torchmetrics", "numpy", "hydra-core")


def write_record(model_dir: str, resolved: str, environment: Mapping[str, Any]) -> None:
    """Writes the resolved settings and the environment into `model_dir`, which is made.

    Raises:
      ConfigError: the folder cannot be written.
    """
    with replacing(os.path.join(model_dir, CONFIG_FILE)) as file:
        file.write("# The settings of the latest training run here. A record: nothing reads it back.\n" + resolved)
    with replacing(os.path.join(model_dir, ENVIRONMENT_FILE)) as file:
        json.dump(environment, file, indent=2)
        file.write("\n")


def describe_environment(command: Sequence[str], *, version: str, started: datetime) -> dict[str, Any]:
    """Returns what one needs to run the same again.

    Args:
      command: arguments of the command.
      version: of tpuspec.
      started: when it started, with its time zone.
    """
    return {
        "tpuspec": version,
        "command": ["python", "-m", "tpuspec.train", *command],
        "started": started.isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "PJRT_DEVICE": os.environ.get("PJRT_DEVICE"),
        "packages": {name: _version(name) for name in _PACKAGES},
        "executable": sys.executable,
        "working_directory": os.getcwd(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextlib.contextmanager
def replacing(name: str) -> Iterator[TextIO]:
    """Opens a file for writing that takes its name when it is complete; its folder is made.

    Args:
      name: its path, or its address.

    Raises:
      ConfigError: the folder cannot be made or written.
    """
    if is_remote(name):
        yield from _replacing_remote(name)
        return
    path = Path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", text=True)
    except OSError as error:
        raise ConfigError(f"model_dir {path.parent} cannot be written: {error.strerror or error}. Give a folder that "
                          "you may write, model_dir=DIR.") from error
    try:
        with open(handle, "w", encoding="utf-8") as file:
            yield file
        # mkstemp makes files for their owner alone; these are like any other file of the run.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _replacing_remote(address: str) -> Iterator[TextIO]:
    text = io.StringIO()
    yield text
    try:
        with fsspec.open(address, "wb") as file:
            file.write(text.getvalue().encode())  # type: ignore[union-attr]
    except Exception as error:
        raise ConfigError(f"{address} cannot be written: {type(error).__name__}: {error}. Give a place that you may "
                          "write, model_dir=DIR.") from error
