"""A SummaryWriter without files."""

from __future__ import annotations

from typing import Any, NamedTuple


class Record(NamedTuple):
    """One value that was written; `kind` is 'scalar', 'histogram', 'image' or 'text'."""

    kind: str
    name: str
    value: Any
    step: int


class MemoryWriter:
    """Keeps what a host_call writes in `records`, in order.

    Attributes:
      records: all that was written.
      num_flushes: calls of flush.
    """

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.num_flushes = 0

    def scalar(self, name: str, value: Any, step: int) -> None:
        self.records.append(Record("scalar", name, value, step))

    def histogram(self, name: str, values: Any, step: int) -> None:
        self.records.append(Record("histogram", name, values, step))

    def image(self, name: str, image: Any, step: int) -> None:
        self.records.append(Record("image", name, image, step))

    def text(self, name: str, text: str, step: int) -> None:
        self.records.append(Record("text", name, text, step))

    def flush(self) -> None:
        self.num_flushes += 1

    def close(self) -> None:
        """Nothing is held."""
