"""TensorBoardWriter: summaries as TensorBoard event files."""

from __future__ import annotations

import errno
import functools
import math
import os
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from tpuspec.summary.values import array_value, image_value, scalar_value, step_value, text_value

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from tpuspec.summary.event_file import EventFile

# The edges of the bins of TensorFlow's histograms.
_SMALLEST_BIN, _LARGEST_BIN, _BIN_GROWTH = 1e-12, 1e20, 1.1
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
        self._file: EventFile | None = None

    def scalar(self, name: str, value: Any, step: int) -> None:
        """Writes one number."""
        from torch.utils.tensorboard.summary import scalar

        number, step = scalar_value(name, value), step_value(step)
        self._add(scalar(name, number), step)

    def histogram(self, name: str, values: Any, step: int) -> None:
        """Writes the distribution of the finite numbers among `values`; where there is none, nothing."""
        from torch.utils.tensorboard.summary import histogram

        array, step = array_value(name, values).astype(np.float64).reshape(-1), step_value(step)
        array = array[np.isfinite(array)].clip(-_LARGEST_BIN, _LARGEST_BIN)
        if array.size:
            self._add(histogram(name, array, _bins()), step)

    def image(self, name: str, image: Any, step: int) -> None:
        """Writes an image, or a grid of images."""
        from torch.utils.tensorboard.summary import image as image_summary

        array, step = image_value(name, image), step_value(step)
        self._add(image_summary(name, array, dataformats=_DATA_FORMATS[array.ndim]), step)

    def text(self, name: str, text: str, step: int) -> None:
        """Writes a text; TensorBoard shows it as Markdown."""
        from torch.utils.tensorboard.summary import text as text_summary

        text, step = text_value(name, text), step_value(step)
        self._add(text_summary(name, text), step)

    def flush(self) -> None:
        """Does nothing: every event is already in the file."""

    def close(self) -> None:
        """Closes the event file; a later write goes on in it."""
        with self._lock:
            self._close()

    def _add(self, summary: Message, step: int) -> None:
        with self._lock:
            try:
                self._open().add(summary, step)
            except OSError:
                self._close()  # a later write begins another file
                raise

    def _open(self) -> EventFile:
        if self._file is None:
            from tpuspec.summary.event_file import EventFile

            self._file = EventFile(self.logdir, self._purge_step)
            self._purge_step = None
        elif not os.path.exists(self._file.path):
            raise FileNotFoundError(errno.ENOENT, "the event file was deleted", self._file.path)
        return self._file

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


@functools.cache
def _bins() -> np.ndarray:
    half = np.geomspace(_SMALLEST_BIN, _LARGEST_BIN, 1 + round(math.log(_LARGEST_BIN / _SMALLEST_BIN, _BIN_GROWTH)))
    return np.concatenate([-half[::-1], [0.0], half])
