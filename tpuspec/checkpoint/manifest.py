"""The manifest of a checkpoint: its step and times, and the size and checksum of each file; written last."""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from dataclasses import dataclass
from typing import Any

from tpuspec.errors import CheckpointError

# 2 has an index of pieces; without one, 1 is written, which older ones read.
FORMAT_VERSION = 2
# The first tpuspec that reads FORMAT_VERSION; raise both together.
NEEDS_TPUSPEC = "0.1.0"
MANIFEST_FILE, INDEX_FILE = "manifest.json", "index.json"
MAX_MANIFEST_BYTES = 1 << 20
# A plain name: no separator, no leading dot or dash, so that it names nothing outside the folder.
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", re.ASCII)


class DamagedCheckpointError(CheckpointError):
    """The bytes of a checkpoint are not those that were written; an earlier one may be whole."""


class NewerFormatError(CheckpointError):
    """A later tpuspec wrote the checkpoint; it is left as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file: its bytes, and their CRC-32."""

    size: int
    crc32: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint consists of.

    Attributes:
      global_step: completed updates.
      saved_at_seconds: time of the commit, since the epoch.
      started_at_seconds: time of the first commit of the run.
      is_finite: whether no number of the model is NaN or infinite.
      tpuspec_version: that wrote it.
      files: name -> entry.
    """

    global_step: int
    saved_at_seconds: float
    started_at_seconds: float
    is_finite: bool
    tpuspec_version: str
    files: dict[str, FileEntry]


def encode_manifest(manifest: Manifest) -> bytes:
    """Returns the file: JSON that begins with the checksum of what follows."""
    version = FORMAT_VERSION if INDEX_FILE in manifest.files else 1
    body = {"format_version": version, "needs_tpuspec": NEEDS_TPUSPEC} | dataclasses.asdict(manifest)
    return _seal(body)


def _seal(body: dict[str, Any]) -> bytes:
    crc32 = zlib.crc32(json.dumps(body, allow_nan=False).encode())
    return json.dumps({"crc32": crc32} | body, allow_nan=False, indent=1).encode() + b"\n"


def is_sealed(content: bytes) -> bool:
    """Whether a manifest was written to its end, and no byte has changed since."""
    try:
        body = json.loads(content)
        del body["crc32"]
        return _seal(body) == content
    except (ValueError, RecursionError, TypeError, KeyError):
        return False


def decode_manifest(content: bytes, where: str, *, version: str) -> Manifest:
    """Reads and checks a manifest.

    Args:
      content: the file's bytes.
      where: its path, for errors.
      version: of this tpuspec, for errors.

    Raises:
      DamagedCheckpointError: a byte is not as it was written.
      CheckpointError: it is of a later format, or names files elsewhere.
    """
    try:
        body = json.loads(content)
        del body["crc32"]
        is_whole = _seal(body) == content
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise damaged(where, f"it is not valid JSON ({error})") from error
    if not is_whole:
        raise damaged(where, "checksum mismatch")
    if body["format_version"] > FORMAT_VERSION:
        raise NewerFormatError(f"{where} needs tpuspec >= {body['needs_tpuspec']}: it has format "
                               f"{body['format_version']}, and this is tpuspec {version}, which reads format "
                               f"{FORMAT_VERSION}.")
    try:
        files = {name: FileEntry(**entry) for name, entry in body.pop("files").items()}
        del body["format_version"], body["needs_tpuspec"]
        manifest = Manifest(files=files, **body)
    except (TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{where} is no manifest of tpuspec: {error}.") from error
    strange = [name for name in files if not _FILE_NAME.fullmatch(name)]
    if strange:
        raise CheckpointError(f"{where} names files outside its folder, or none: {strange[:3]}. It was not written by "
                              "tpuspec; take another checkpoint.")
    return manifest


def damaged(where: str, why: str) -> DamagedCheckpointError:
    """Returns the error for a file whose bytes have changed."""
    return DamagedCheckpointError(f"The checkpoint file {where} is damaged: {why}. Restore an earlier checkpoint.")
