"""The largest batch that fits: programs are compiled for a few, which come from lines through what others needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tpuspec.plan.plan import ModePlan

_MOST_GROWTH = 16
_FINENESS = 100
_MOST_ROWS = 1 << 30


def search_largest(given: ModePlan, unit: int, plan: Callable[[int], ModePlan]) -> ModePlan:
    """Searches for the largest global batch that fits, to one hundredth or to the least that replicas can share.

    Args:
      given: the plan of some batch.
      unit: rows that a batch is a multiple of.
      plan: returns the plan of a batch of so many rows.

    Returns:
      The plan of the largest batch that was found; where none fits, that of the smallest.
    """
    search = _Search(unit)
    search.take(given)
    while (rows := search.next_rows()) is not None:
        search.take(plan(rows))
    return search.result()


class _Search:
    """The largest batch that is known to fit, and the smallest that is known not to."""

    def __init__(self, unit: int) -> None:
        self._unit = unit
        self._fits: ModePlan | None = None
        self._before: ModePlan | None = None  # the last one that fitted
        self._fails: ModePlan | None = None
        self._newest: ModePlan | None = None
        self._num_tried = self._num_between = 0

    def take(self, plan: ModePlan) -> None:
        """Takes note of a batch between the two."""
        self._num_tried += 1
        self._newest = plan
        if plan.fits:
            self._before, self._fits = self._fits, plan
        else:
            self._fails = plan

    def next_rows(self) -> int | None:
        """Returns the rows of the next batch to try; None at the end."""
        low = self._fits.rows // self._unit if self._fits is not None else 0
        least = max(1, low // _FINENESS)
        if self._fails is None:
            guess = self._where_full(self._before, self._fits)
            rows = self._unit * max(low + least, min(guess or 2 * low, _MOST_GROWTH * low))
            return rows if rows <= _MOST_ROWS else None
        high = self._fails.rows // self._unit
        if high - low <= least:
            return None
        if self._fits is None:
            overfull = self._fails.peak_bytes / (self._fails.capacity_bytes or self._fails.peak_bytes or 1)
            return self._unit * max(1, int(high / max(2, overfull)))
        self._num_between += 1
        guess = (low + high) // 2
        if self._num_between % 3 == 1:
            guess = self._where_full(self._fits, self._fails) or guess
        elif self._num_between % 3 == 2:  # the line is exact, as a rule: the one beside ends the search
            guess = low + least if self._newest is self._fits else high - least
        return self._unit * max(low + 1, min(guess, high - 1))

    def _where_full(self, one: ModePlan | None, other: ModePlan | None) -> int | None:
        """Returns at how many units of rows memory is full, by the line through two plans; None where that is open."""
        if one is None or other is None or other.capacity_bytes is None or one.peak_bytes >= other.peak_bytes:
            return None
        if not other.fits and other.peak_bytes <= other.capacity_bytes:
            return None  # the compiler does not say what it would need
        slope = (other.peak_bytes - one.peak_bytes) / (other.rows - one.rows)
        return int((one.rows + (other.capacity_bytes - one.peak_bytes) / slope) // self._unit)

    def result(self) -> ModePlan:
        """Returns the plan that was found."""
        found = self._fits or self._fails
        assert found is not None, "one was taken"
        too_many = self._fails.rows if self._fits is not None and self._fails is not None else None
        return dataclasses.replace(found, num_tried=self._num_tried, rows_too_many=too_many)
