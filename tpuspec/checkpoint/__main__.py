"""`python -m tpuspec.checkpoint list|verify|show PATH`: what is in a model_dir, whether it is whole, what one holds."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from datetime import datetime

from tpuspec.checkpoint.folder import CHECKPOINT_NAME
from tpuspec.checkpoint.format import MODEL
from tpuspec.checkpoint.reader import Reader
from tpuspec.checkpoint.store import CheckpointStore
from tpuspec.errors import CheckpointError, ConfigError
from tpuspec.files.location import Location

DONE, WRONG_USAGE, STATE_REFUSED = 0, 2, 3


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns 0, 2 for an address that cannot be opened, or 3 for what is no whole checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m tpuspec.checkpoint", description=__doc__)
    parser.add_argument("command", choices=["list", "verify", "show"])
    parser.add_argument("path", help="a model_dir, or a folder checkpoint-<step>; or the address of one, as gs://bucket/run")
    arguments = parser.parse_args(argv)
    try:
        return {"list": _list, "verify": _verify, "show": _show}[arguments.command](arguments.path)
    except (CheckpointError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return STATE_REFUSED if isinstance(error, CheckpointError) else WRONG_USAGE


def _is_checkpoint(path: str) -> bool:
    return CHECKPOINT_NAME.fullmatch(path.rstrip("/").rpartition("/")[2]) is not None


def _folders(path: str) -> list[Location]:
    if _is_checkpoint(path):
        return [path]
    store = CheckpointStore(path)
    folders = [store.path(step) for step in store.steps()]
    if not folders:
        raise CheckpointError(f"{path!r} is no checkpoint and holds none. Give a model_dir.")
    return folders


def _list(path: str) -> int:
    for folder in _folders(path):
        with Reader.open(folder) as reader:
            manifest = reader.manifest
        size = sum(entry.size for entry in manifest.files.values())
        when = datetime.fromtimestamp(manifest.saved_at_seconds).astimezone().isoformat(" ", "seconds")
        finite = "" if manifest.is_finite else "  holds NaN or infinity"
        print(f"step {manifest.global_step:>10}  {size / 1e6:>10.2f} MB  {when}  {folder}{finite}")
    return DONE


def _verify(path: str) -> int:
    code = DONE
    for folder in _folders(path):
        try:
            with Reader.open(folder) as reader:
                reader.verify()
            print(f"whole    {folder}")
        except CheckpointError as error:
            print(f"refused  {folder}: {error}")
            code = STATE_REFUSED
    return code


def _show(path: str) -> int:
    folder = path if _is_checkpoint(path) else CheckpointStore(path).latest()
    if folder is None:
        raise CheckpointError(f"{path!r} is no checkpoint and holds none that is whole.")
    with Reader.open(folder) as reader:
        manifest, entries = reader.manifest, reader.entries(MODEL)
    print(f"{folder}: step {manifest.global_step}, tpuspec {manifest.tpuspec_version}, "
          f"{sum(math.prod(entry.shape) for entry in entries.values()):,} numbers in the model")
    for name, entry in entries.items():
        print(f"  {name}  {str(entry.dtype).removeprefix('torch.')} {list(entry.shape)}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
