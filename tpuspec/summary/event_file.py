"""EventFile: an event file of TensorBoard, each event in it when `add` returns."""

from __future__ import annotations

import io
import itertools
import os
import socket
import time

from google.protobuf.message import Message
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter

_VERSION = "brain.Event:2"
_numbers = itertools.count()
_closed: dict[tuple[int, str], str] = {}  # process and folder -> the file that was written last, and is whole


class EventFile:
    """Writes to a folder, which is made: on in the file that this process wrote there last, else in a new one.

    torch's SummaryWriter is not used: it writes on a thread of its own, which prints a traceback where the disk is
    full, and fails some later call; and each evaluation would leave another file.

    Args:
      logdir: the folder.
      purge_step: TensorBoard hides what the folder holds of this step and later ones so far; None hides nothing.

    Raises:
      OSError: the folder or the file cannot be made or written.

    Source: the idea of one file a process is that of tf.summary.FileWriterCache.
    """

    def __init__(self, logdir: str, purge_step: int | None = None) -> None:
        os.makedirs(logdir, exist_ok=True)
        self._logdir = logdir
        earlier = _closed.pop((os.getpid(), logdir), None)
        is_new = earlier is None or not os.path.exists(earlier)
        self.path = os.path.join(logdir, _new_name()) if earlier is None or is_new else earlier
        self._file = io.FileIO(self.path, "xb" if is_new else "ab")
        try:
            if is_new:
                self._write(Event(file_version=_VERSION))
            if purge_step is not None:
                self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        except OSError:
            self._file.close()
            raise

    def add(self, summary: Message, step: int) -> None:
        """Writes an event that holds a `Summary` of TensorBoard's protocol.

        Raises:
          OSError: it cannot be written; the file is closed, for a torn event hides all that would come behind it.
        """
        try:
            self._write(Event(summary=summary, step=step))
        except OSError:
            self._file.close()
            raise

    def close(self) -> None:
        """Closes the file, from which on the next one of this folder writes."""
        if not self._file.closed:
            self._file.close()
            for key in [key for key, path in _closed.copy().items() if not os.path.exists(path)]:
                _closed.pop(key, None)  # of a folder that is gone, as a remote writer's is
            _closed[os.getpid(), self._logdir] = self.path

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        part = record.getbuffer()
        while part:
            part = part[self._file.write(part):]


def _new_name() -> str:
    """Returns a name of the form by which TensorBoard knows its files; it reads them in the order of their names."""
    return f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{next(_numbers):06}"
