"""EventFile: one event file of TensorBoard, each event in it when `add` returns."""

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


class EventFile:
    """Makes a file in a folder, which is made too.

    torch's SummaryWriter is not used: it writes on a thread of its own, which prints a traceback where the disk is
    full, and fails some later call.

    Args:
      logdir: the folder.
      purge_step: TensorBoard hides what the folder's earlier files hold of this step and later ones; None hides
        nothing.

    Raises:
      OSError: the folder or the file cannot be made or written.
    """

    def __init__(self, logdir: str, purge_step: int | None = None) -> None:
        os.makedirs(logdir, exist_ok=True)
        # The form by which TensorBoard knows its files; their names in order are the order in which it reads them.
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{next(_numbers):06}"
        self.path = os.path.join(logdir, name)
        self._file = io.FileIO(self.path, "xb")
        try:
            self._write(Event(file_version=_VERSION))
            if purge_step is not None:
                self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        except OSError:
            self.close()
            raise

    def add(self, summary: Message, step: int) -> None:
        """Writes an event that holds a `Summary` of TensorBoard's protocol.

        Raises:
          OSError: it cannot be written.
        """
        self._write(Event(summary=summary, step=step))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        part = record.getbuffer()
        while part:
            part = part[self._file.write(part):]
