"""MultiWriter: one call, several writers; a log folder that fails does not end the training."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterable
from typing import Any

from tpuspec.files.location import is_remote
from tpuspec.summary.jsonl import JsonlWriter
from tpuspec.summary.remote import RemoteTensorBoardWriter
from tpuspec.summary.tensorboard import TensorBoardWriter
from tpuspec.summary.writer import SummaryWriter

logger = logging.getLogger(__name__)


class MultiWriter:
    """Hands each summary to every writer, in order.

    A writer that raises OSError (its folder was deleted, its disk is full) is closed, and left out from then on. The
    first one of a folder is named in a warning; that others fail there too is no news. Without writers all is
    discarded: what a process that is not the chief needs.
    """

    def __init__(self, writers: Iterable[SummaryWriter]) -> None:
        self._lock = threading.Lock()
        self._writers = tuple(writers)
        self._told: set[str] = set()

    def scalar(self, name: str, value: Any, step: int) -> None:
        """Writes one number to each writer."""
        self._each("scalar", name, value, step)

    def histogram(self, name: str, values: Any, step: int) -> None:
        """Writes the distribution of `values` to each writer."""
        self._each("histogram", name, values, step)

    def image(self, name: str, image: Any, step: int) -> None:
        """Writes an image, or a grid of images, to each writer."""
        self._each("image", name, image, step)

    def text(self, name: str, text: str, step: int) -> None:
        """Writes a text to each writer."""
        self._each("text", name, text, step)

    def flush(self) -> None:
        """Flushes each writer."""
        self._each("flush")

    def close(self) -> None:
        """Closes each writer."""
        self._each("close")

    def _each(self, method: str, *arguments: Any) -> None:
        for writer in self._writers:
            try:
                getattr(writer, method)(*arguments)
            except OSError as error:
                self._leave_out(writer, error)

    def _leave_out(self, writer: SummaryWriter, error: OSError) -> None:
        with self._lock:
            if not any(writer is kept for kept in self._writers):
                return
            self._writers = tuple(kept for kept in self._writers if kept is not writer)
            folder = getattr(writer, "logdir", "its folder")
            is_news = folder not in self._told
            self._told.add(folder)
        if is_news:
            logger.warning("No more summaries are written by %s to %s, which failed: %s. The run goes on without them, "
                           "and without whatever else fails there.", type(writer).__name__, folder, error)
        with contextlib.suppress(OSError):
            writer.close()


def create_file_writer(logdir: str | os.PathLike[str], after_step: int | None = None) -> SummaryWriter:
    """Returns a writer of TensorBoard event files and of metrics.jsonl in `logdir`; nothing is created before a write.

    A remote folder (gs://bucket/run) gets the event files only: an object store cannot append lines.

    Args:
      logdir: the folder.
      after_step: where a run goes on from: what the folder holds of later steps is written anew, and does not count
        twice. None leaves all as it is.
    """
    folder = os.fspath(logdir)
    if is_remote(folder):
        return MultiWriter([RemoteTensorBoardWriter(folder, after_step)])
    return MultiWriter([TensorBoardWriter(folder, after_step), JsonlWriter(folder, after_step)])
