"""JsonlWriter: summaries as one JSON object a line, for programs to read while the run goes on."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from tpuspec.spec.json_numbers import json_number
from tpuspec.summary.values import array_value, image_value, scalar_value, step_value, text_value

FILE_NAME = "metrics.jsonl"


class JsonlWriter:
    """Appends to `<logdir>/metrics.jsonl`, made at the first write.

    Each line is strict JSON with "step", "name" and "wall_time", and "value" of a scalar, "text" of a text, "histogram"
    (count, min, max, mean, std) or the "shape" of an image. Numbers that JSON lacks are the strings "NaN", "Infinity"
    and "-Infinity". A line is in the file when the call returns. What a killed process left of a line stays a line of
    its own.

    Args:
      logdir: folder; made when it is missing.
      after_step: lines of later steps, which an earlier run wrote, are dropped at the first write; None drops none.
      clock: returns the wall time in seconds.
    """

    def __init__(self, logdir: str | os.PathLike[str], after_step: int | None = None, *,
                 clock: Callable[[], float] = time.time) -> None:
        self.logdir = os.path.abspath(logdir)
        self.path = os.path.join(self.logdir, FILE_NAME)
        self._after_step = after_step
        self._clock = clock
        self._lock = threading.Lock()
        self._file: io.FileIO | None = None

    def scalar(self, name: str, value: Any, step: int) -> None:
        """Appends one number."""
        self._append(step, name, "value", json_number(scalar_value(name, value)))

    def histogram(self, name: str, values: Any, step: int) -> None:
        """Appends the statistics of `values`; those of no number are null."""
        self._append(step, name, "histogram", _statistics(array_value(name, values)))

    def image(self, name: str, image: Any, step: int) -> None:
        """Appends the shape of the image, not its pixels."""
        self._append(step, name, "shape", list(image_value(name, image).shape))

    def text(self, name: str, text: str, step: int) -> None:
        """Appends a text."""
        self._append(step, name, "text", text_value(name, text))

    def flush(self) -> None:
        """Does nothing: every line is already in the file."""

    def close(self) -> None:
        """Closes the file; a later write opens it again."""
        with self._lock:
            self._close()

    def _append(self, step: Any, name: str, kind: str, value: Any) -> None:
        record = {"step": step_value(step), "name": name, kind: value, "wall_time": self._clock()}
        line = memoryview(json.dumps(record, allow_nan=False).encode() + b"\n")
        with self._lock:
            try:
                file = self._open()
                while line:
                    line = line[file.write(line):]
            except OSError:
                # A line may be torn: opening again ends it.
                self._close()
                raise

    def _open(self) -> io.FileIO:
        if self._file is None:
            os.makedirs(self.logdir, exist_ok=True)
            self._drop_later_steps()
            self._file = open(self.path, "ab+", buffering=0)  # noqa: SIM115 - kept open, close() closes it
            if self._file.seek(0, os.SEEK_END) > 0:
                self._file.seek(-1, os.SEEK_END)
                if self._file.read(1) != b"\n":
                    self._file.write(b"\n")
        elif not os.path.exists(self.path):
            raise FileNotFoundError(errno.ENOENT, "the log file was deleted", self.path)
        return self._file

    def _drop_later_steps(self) -> None:
        after_step = self._after_step
        if after_step is not None and os.path.exists(self.path):
            with open(self.path, "rb") as file:
                if any(_is_after(line, after_step) for line in file):
                    file.seek(0)
                    self._replace(line for line in file if not _is_after(line, after_step))
        self._after_step = None

    def _replace(self, lines: Iterable[bytes]) -> None:
        kept = f"{self.path}.kept"
        try:
            with open(kept, "wb") as new:
                new.writelines(lines)
            os.replace(kept, self.path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(kept)
            raise

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def _is_after(line: bytes, step: int) -> bool:
    try:
        return json.loads(line)["step"] > step
    except (ValueError, TypeError, KeyError):  # torn, or not ours
        return False


def _statistics(array: np.ndarray) -> dict[str, Any]:
    if not array.size:
        return {"count": 0, "min": None, "max": None, "mean": None, "std": None}
    array = array.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        numbers = {"min": array.min(), "max": array.max(), "mean": array.mean(), "std": array.std()}
    return {"count": array.size} | {name: json_number(float(number)) for name, number in numbers.items()}
