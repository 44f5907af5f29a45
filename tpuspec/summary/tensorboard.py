"""TensorBoardWriter: summaries as TensorBoard event files."""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from tpuspec.summary.values import array_value, image_value, scalar_value, step_value, text_value

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter as TorchSummaryWriter

# Events that may wait for the disk before a write waits too.
_QUEUED_EVENTS = 100
# The bins of an event file's histogram end here.
_LARGEST_BIN = 1e20
_DATA_FORMATS = {2: "HW", 3: "CHW", 4: "NCHW"}


class TensorBoardWriter:
    """Writes event files into `logdir`; nothing is imported or created before the first write.

    Args:
      logdir: folder; made when it is missing.
      after_step: what event files of earlier runs hold of later steps is hidden by TensorBoard; None hides nothing.
    """

    def __init__(self, logdir: str | os.PathLike[str], after_step: int | None = None) -> None:
        self.logdir = os.path.abspath(logdir)
        self._purge_step = None if after_step is None else after_step + 1
        self._lock = threading.Lock()
        self._writer: TorchSummaryWriter | None = None

    def scalar(self, name: str, value: Any, step: int) -> None:
        """Writes one number."""
        number, step = scalar_value(name, value), step_value(step)
        self._open().add_scalar(name, number, step)

    def histogram(self, name: str, values: Any, step: int) -> None:
        """Writes the distribution of the finite numbers among `values`; where there is none, nothing."""
        array, step = array_value(name, values).astype(np.float64).reshape(-1), step_value(step)
        array = array[np.isfinite(array)].clip(-_LARGEST_BIN, _LARGEST_BIN)
        if array.size:
            self._open().add_histogram(name, array, step)

    def image(self, name: str, image: Any, step: int) -> None:
        """Writes an image, or a grid of images."""
        array, step = image_value(name, image), step_value(step)
        self._open().add_image(name, array, step, dataformats=_DATA_FORMATS[array.ndim])

    def text(self, name: str, text: str, step: int) -> None:
        """Writes a text; TensorBoard shows it as Markdown."""
        text, step = text_value(name, text), step_value(step)
        self._open().add_text(name, text, step)

    def flush(self) -> None:
        """Returns when all that was written is in the event file."""
        with self._lock:
            writer = self._writer
        if writer is not None:
            writer.flush()

    def close(self) -> None:
        """Flushes, closes the event file and ends its thread; a later write begins another event file."""
        with self._lock:
            writer, self._writer = self._writer, None
        if writer is None:
            return
        event_file = writer.file_writer
        try:
            writer.close()
        finally:
            # After a failed flush torch leaves the file's thread running.
            if event_file is not None:
                event_file.close()

    def _open(self) -> TorchSummaryWriter:
        with self._lock:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter as TorchSummaryWriter

                self._writer = TorchSummaryWriter(self.logdir, purge_step=self._purge_step, max_queue=_QUEUED_EVENTS)
                self._purge_step = None
            elif not os.path.isdir(self.logdir):
                # Found here, before the file's thread fails: it would print a traceback, and raise some writes later.
                raise FileNotFoundError(errno.ENOENT, "the log folder was deleted", self.logdir)
            return self._writer
