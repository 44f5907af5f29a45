"""Contenders of one process, measured in turns: what slows the machine slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds by the wall clock, and of all threads' processor time, which a busy machine changes least."""

    wall: float
    cpu: float

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.wall - other.wall, self.cpu - other.cpu)

    def __truediv__(self, number: float) -> Cost:
        return Cost(self.wall / number, self.cpu / number)

    @classmethod
    def now(cls) -> Cost:
        return cls(time.perf_counter(), time.process_time())

    @classmethod
    def of(cls, run: Callable[[], object]) -> Cost:
        begun = cls.now()
        run()
        return cls.now() - begun


def interleave(measures: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """Takes every measure `repeats` times; each repeat begins with another one."""
    names = list(measures)
    results: dict[str, list[T]] = {name: [] for name in names}
    for repeat in range(repeats):
        for i in range(len(names)):
            name = names[(repeat + i) % len(names)]
            results[name].append(measures[name]())
    return results


def median_ratio(own: Iterable[float], other: Iterable[float]) -> float:
    """Returns the median over the repeats of the ratio in one repeat."""
    return round(statistics.median(a / b for a, b in zip(own, other, strict=True)), 3)


def spread(values: Iterable[float], digits: int) -> dict[str, Any]:
    """Returns median, smallest and largest for a line of JSON."""
    kept = list(values)
    return {"median": round(statistics.median(kept), digits),
            "spread": [round(min(kept), digits), round(max(kept), digits)], "repeats": len(kept)}


def table(rows: Sequence[Sequence[object]]) -> str:
    """Returns rows of cells as lines for people; the first row is the head."""
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) if i < 2 else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in cells)
