"""Names that become part of a folder's name."""

from __future__ import annotations

import re

from tpuspec.errors import ConfigError, ConfigTypeError

_NAME = re.compile(r"[\w][\w.\- ]{0,99}")


def check_name(name: object, what: str = "name") -> str:
    """Returns the name of an evaluation or of exports, which becomes part of a folder's name.

    Args:
      name: what the user gave.
      what: how the message calls it.

    Raises:
      ConfigTypeError: no string.
      ConfigError: anything but letters, digits, '_', '-', '.' and spaces, 100 at most, or a leading '-' or '.'.
    """
    if not isinstance(name, str):
        raise ConfigTypeError(f"{what} must be a str; got {type(name).__name__}.")
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{what} must be 1 to 100 letters, digits, '_', '-', '.' or spaces, and start with a letter, "
                          f"digit or '_': it names a folder; got {name!r}.")
    return name
