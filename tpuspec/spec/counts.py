"""Counts, numbers of steps and durations that a user gives."""

from __future__ import annotations

import math
import numbers
from typing import Any

from tpuspec.errors import ConfigError, ConfigTypeError


def check_positive_int(name: str, value: object) -> None:
    """Checks a count.

    Raises:
      ConfigTypeError: not an int (numpy's are).
      ConfigError: zero or negative.
    """
    check_int(name, value)
    if value <= 0:  # type: ignore[operator]
        raise ConfigError(f"{name} must be positive; got {value}.")


def check_int(name: str, value: object) -> None:
    """Checks a type.

    Raises:
      ConfigTypeError: not an int.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ConfigTypeError(f"{name} must be int; got {value!r}.")


def check_above_zero(name: str, value: Any) -> None:
    """Checks the sign of a number of steps, before its type.

    Raises:
      ConfigError: zero or negative.
      ConfigTypeError: no number.
    """
    if value is None:
        return
    if not isinstance(value, numbers.Real):
        raise ConfigTypeError(f"{name} must be int; got {value!r}.")
    if value <= 0:
        raise ConfigError(f"Must specify {name} > 0, given: {value}.")


def check_seconds(name: str, seconds: Any) -> None:
    """Checks a duration.

    Raises:
      ConfigTypeError: no number.
      ConfigError: negative, infinite or NaN.
    """
    if not isinstance(seconds, numbers.Real) or isinstance(seconds, bool):
        raise ConfigTypeError(f"{name} must be a number of seconds; got {seconds!r}.")
    if not (float(seconds) >= 0 and math.isfinite(seconds)):
        raise ConfigError(f"Must specify {name} >= 0, a finite number of seconds, given: {seconds}.")
