"""Numbers as strict JSON has them: NaN and infinity, which it lacks, as their names."""

from __future__ import annotations

import math

NOT_FINITE = ("NaN", "Infinity", "-Infinity")


def json_number(value: float) -> float | str:
    """Returns a number for JSON; float() makes the number of it again."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
