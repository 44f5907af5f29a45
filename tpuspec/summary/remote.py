"""RemoteTensorBoardWriter: event files at an address of fsspec, written here and uploaded whole."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any

import fsspec

from tpuspec.errors import as_os_errors
from tpuspec.summary.tensorboard import TensorBoardWriter

SECONDS_BETWEEN_UPLOADS = 60.0


class RemoteTensorBoardWriter:
    """Writes event files into a temporary folder, and uploads them once a minute, at flush and at close.

    Object stores cannot append to what they hold, so that a file is sent whole each time; event files are small.

    Args:
      logdir: an address such as gs://bucket/run.
      after_step: as in TensorBoardWriter.
      clock: monotonic seconds.
    """

    def __init__(self, logdir: str, after_step: int | None = None, *,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.logdir = logdir.rstrip("/")
        self._after_step = after_step
        self._clock = clock
        self._folder: str | None = None
        self._writer: TensorBoardWriter | None = None
        self._uploaded_at = clock()
        self._sizes: dict[str, int] = {}

    def scalar(self, name: str, value: Any, step: int) -> None:
        """Writes one number."""
        self._open().scalar(name, value, step)
        self._upload_in_time()

    def histogram(self, name: str, values: Any, step: int) -> None:
        """Writes the distribution of the finite numbers among `values`."""
        self._open().histogram(name, values, step)
        self._upload_in_time()

    def image(self, name: str, image: Any, step: int) -> None:
        """Writes an image, or a grid of images."""
        self._open().image(name, image, step)
        self._upload_in_time()

    def text(self, name: str, text: str, step: int) -> None:
        """Writes a text."""
        self._open().text(name, text, step)
        self._upload_in_time()

    def flush(self) -> None:
        """Returns when all that was written is at the address.

        Raises:
          OSError: it cannot be written there.
        """
        if self._writer is not None:
            self._writer.flush()
            self._upload()

    def close(self) -> None:
        """Uploads, and deletes the temporary folder; a later write begins another event file.

        Raises:
          OSError: it cannot be written there.
        """
        writer, self._writer = self._writer, None
        folder, self._folder = self._folder, None
        if writer is None or folder is None:
            return
        try:
            writer.close()
            self._upload(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _open(self) -> TensorBoardWriter:
        if self._writer is None:
            self._folder = tempfile.mkdtemp(prefix="tpuspec-events-")
            self._writer = TensorBoardWriter(self._folder, self._after_step)
            self._after_step = None
            self._sizes.clear()
        return self._writer

    def _upload_in_time(self) -> None:
        if self._clock() - self._uploaded_at >= SECONDS_BETWEEN_UPLOADS:
            self.flush()

    def _upload(self, folder: str | None = None) -> None:
        folder = folder or self._folder
        assert folder is not None, "there is a writer"
        self._uploaded_at = self._clock()
        with as_os_errors():  # which end the summaries, and not the run
            fs, path = fsspec.url_to_fs(self.logdir)
            fs.makedirs(path, exist_ok=True)
            for name in os.listdir(folder):
                file = os.path.join(folder, name)
                size = os.path.getsize(file)
                if self._sizes.get(name) != size:
                    fs.put_file(file, f"{path}/{name}")
                    self._sizes[name] = size
