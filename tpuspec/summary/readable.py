"""Numbers and lines as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from tpuspec.errors import TpuspecError
from tpuspec.summary.values import array_value

# Larger arrays are shown by their shape.
_MOST_ELEMENTS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressLine:
    """One state of a loop; what is None or '' is left out of its text."""

    description: str
    total: int | None
    step: int
    loss: float | None
    steps_per_second: float | None
    examples_per_second: float | None
    step_kind: str

    def text(self) -> str:
        """Returns such as 'train  step 300/1000  loss 0.1234  81.2 steps/s  5.2k examples/s  traced'."""
        parts = [self.description, f"step {self.step}" if self.total is None else f"step {self.step}/{self.total}"]
        if self.loss is not None:
            parts.append(f"loss {format_loss(self.loss)}")
        if self.steps_per_second is not None:
            parts.append(f"{format_rate(self.steps_per_second)} steps/s")
        if self.examples_per_second is not None:
            parts.append(f"{format_rate(self.examples_per_second)} examples/s")
        return "  ".join(part for part in (*parts, self.step_kind) if part)


def format_float(value: float) -> str:
    """Returns `value` with six significant digits at most, such as '0.95' or '2e-08'."""
    return f"{value:.6g}"


def format_loss(value: float) -> str:
    """Returns `value` with four significant digits always, so that a line that is redrawn keeps its width."""
    return f"{value:#.4g}".removesuffix(".")


def format_rate(value: float) -> str:
    """Returns such as '0.031', '81.2', '5.2k' or '1.4M'."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.1f}{letter}"
    return f"{value:.1f}" if abs(value) >= 1 else f"{value:.2g}"


def format_value(value: Any) -> str:
    """Returns a metric's value on one line: a number, a small array in full, a larger one by dtype and shape."""
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return format_float(value)
    if not isinstance(value, Tensor | np.ndarray | np.generic | list | tuple):
        return " ".join(str(value).split())
    try:
        array = array_value("value", value)
    except TpuspecError:
        return " ".join(str(value).split())
    if array.size > _MOST_ELEMENTS:
        return f"{array.dtype} {list(array.shape)}"
    return _nested(array.reshape(()).item() if array.size == 1 else array.tolist())


def _nested(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_nested(item) for item in value)}]"
    return format_value(value)


def aligned_lines(title: str, rows: Mapping[str, str]) -> list[str]:
    """Returns the title, and a line for each row with the values below one another."""
    width = max((len(name) for name in rows), default=0)
    return [title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())]
