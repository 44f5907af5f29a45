"""Values of the command line, held against the type of the default that a config file or a signature gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpuspec.errors import ConfigError

_SWITCHES = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", list: "a list",
          dict: "a mapping"}
ABSENT = object()
"""The default of a key that has none."""


def fit(key: str, value: Any, default: Any) -> Any:
    """Returns a value as the type of its default, where it says the same.

    Words mean what they mean in a YAML file: on, off, yes and no are booleans, unless the default is a string. None is
    null everywhere. Values in lists and mappings are fitted one by one; null fits every default, and every number fits
    the default 0.

    Args:
      key: for messages.
      value: of data: None, a number, a boolean, a string, a list or a mapping.
      default: the value that it replaces; None or ABSENT fits every value.

    Raises:
      ConfigError: the value is of another type.
    """
    if isinstance(value, str) and value == "None":
        return None
    if isinstance(value, Mapping) and (isinstance(default, Mapping) or default is None or default is ABSENT):
        defaults = default if isinstance(default, Mapping) else {}
        return {name: fit(f"{key}.{name}", item, defaults.get(name, ABSENT)) for name, item in value.items()}
    if value is None or _is_open(default) or _is_same(value, default):
        return value
    if default is None or default is ABSENT:
        return _as_switch(value) if isinstance(value, str) else value
    if isinstance(default, list | tuple):
        if not isinstance(value, list | tuple):
            raise _refused(key, value, default, list)
        kinds = {type(item) for item in default}
        return [fit(f"{key}[{i}]", item, default[0] if len(kinds) == 1 else ABSENT) for i, item in enumerate(value)]
    return _fit_one(key, value, default)


def _fit_one(key: str, value: Any, default: Any) -> Any:
    kind = next((kind for kind in (bool, int, float, str, Mapping) if isinstance(default, kind)), None)
    if kind is None:
        return value
    fitted: Any = value
    if kind is bool:
        fitted = _as_switch(value) if isinstance(value, str) else bool(value) if value in (0, 1) else value
    elif kind is int and isinstance(value, float) and value.is_integer():
        fitted = int(value)
    elif kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            fitted = float(value)
        except (ValueError, OverflowError):
            fitted = value
    elif kind is int and isinstance(value, float) and default == 0:  # people write 0 for a rate that is off
        return value
    if not isinstance(fitted, kind) or (isinstance(fitted, bool) and kind is not bool):
        raise _refused(key, value, default, dict if kind is Mapping else kind)
    return fitted


def _as_switch(value: str) -> Any:
    return _SWITCHES.get(value.lower(), value)


def _is_open(default: Any) -> bool:
    """Whether a default's type shows only once all settings are known: it is missing, or an interpolation."""
    return isinstance(default, str) and (default == "???" or "${" in default)


def _is_same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and not isinstance(value, list | tuple) and value == default


def _refused(key: str, value: Any, default: Any, kind: type) -> ConfigError:
    mends = {str: f" To give it as a string, quote it twice: '{key}=\"{value}\"'.",
             int: f" If it may be a fraction, write the default as {default}.0 in the config."}
    mend = mends.get(kind, "") if isinstance(value, int | float) and not isinstance(value, bool) else ""
    return ConfigError(f"{key} must be {_NAMES[kind]}, as its default, {default!r}, is, or null; got {value!r}.{mend}")
