"""Whether a folder can be written, and how to mend it where it cannot."""

from __future__ import annotations

import errno
from pathlib import Path

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


def prove_writable(folder: Path) -> None:
    """Makes the folder, and writes a file; permission bits say nothing to root, or of a read-only mount.

    Raises:
      OSError, ValueError: it cannot be made, or written.
    """
    probe = folder / ".probe"  # one name: what a process that was killed has left, the next one removes
    folder.mkdir(parents=True, exist_ok=True)
    try:
        probe.write_bytes(b"tpuspec")
    finally:
        probe.unlink(missing_ok=True)  # on a full disk it is made, and stays empty


def how_to_mend(error: Exception) -> str:
    """Returns what to do about an error of `prove_writable`, as the beginning of a sentence."""
    number = getattr(error, "errno", None)
    if number in NO_ROOM:
        return "Make room"
    return "Raise the limit on the size of files" if number == errno.EFBIG else "Mend its permissions"
