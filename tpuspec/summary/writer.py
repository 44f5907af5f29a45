"""SummaryWriter: where scalars, histograms, images and texts of a run go."""

from __future__ import annotations

from typing import Any, Protocol


class SummaryWriter(Protocol):
    """Writes named values of a step; `JsonlWriter`, `TensorBoardWriter` and `MultiWriter` are ones.

    Numbers may come as torch tensors (of any device), numpy arrays or Python numbers. Methods may be called from any
    thread. A writer may be used again after close(): it then goes on where it stood.

    Every method that takes a value raises ConfigError for a shape and ConfigTypeError for a type that it cannot write,
    and may raise OSError where its folder cannot be written.
    """

    def scalar(self, name: str, value: Any, step: int) -> None:
        """Writes one number; a tensor or an array of one element counts as one."""
        ...

    def histogram(self, name: str, values: Any, step: int) -> None:
        """Writes the distribution of numbers of any shape."""
        ...

    def image(self, name: str, image: Any, step: int) -> None:
        """Writes an image [H, W] or [C, H, W], or a grid of images [N, C, H, W]; float in 0..1, or uint8."""
        ...

    def text(self, name: str, text: str, step: int) -> None:
        """Writes a text."""
        ...

    def flush(self) -> None:
        """Returns when all that was written is in the files."""
        ...

    def close(self) -> None:
        """Flushes, and releases files and threads; does nothing where nothing is open."""
        ...
