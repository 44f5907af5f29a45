"""Errors of Hydra, OmegaConf and YAML as one clear message: the key, the file, the nearest key that exists."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tpuspec.cli.choices import GROUP, Choice
from tpuspec.cli.schema import Mode, TrainConfig
from tpuspec.errors import ConfigError

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError)
ALLOW = "allow"


def explained(error: Exception, choices: Mapping[str, Choice], compose_base: Callable[[], DictConfig]) -> ConfigError:
    """Returns the error to raise for one of COMPOSITION_ERRORS.

    Args:
      error: what composing raised.
      choices: to find the file that Hydra names.
      compose_base: composes the chosen config without the other overrides, for the keys that it has.
    """
    found = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    if not isinstance(found, OmegaConfBaseException):
        return ConfigError(re.sub(r"\n?(Config search path:|See https://)(.|\n)*", "", str(error)).strip())
    key, reason = found.full_key or "", str(found.msg or found).splitlines()[0]
    in_file = re.match(r"In '([^']+)'", str(error))
    file = choices.get(in_file[1].removeprefix(GROUP + "/")) if in_file else None
    place = f"{file.path}: " if file else ""
    if re.match(r"Key '.*' (not in|is not in struct)", reason):
        try:
            base = OmegaConf.structured(TrainConfig) if file else compose_base()
        except COMPOSITION_ERRORS:
            base = OmegaConf.structured(TrainConfig)
        return ConfigError(place + unknown_key(key, base))
    if reason.endswith("does not support deletion"):
        return ConfigError(f"{place}{key} cannot be removed; set it to null.")
    if key == "mode" and (value := re.match(r"Invalid value '(.*)',", reason)):
        return ConfigError(f"{place}mode must be one of {', '.join(m.name for m in Mode)}; got {value[1]!r}.")
    return ConfigError(f"{place}{key}: {reason}" if key else place + reason)


def unknown_key(key: str, base: DictConfig) -> str:
    """Returns the message for a key that does not exist, with the nearest one of `base`."""
    if key.split(".")[0] == ALLOW:
        return ("allow is for the command line only: a config file cannot allow its own names. Give "
                "'allow=[mypackage.]'.")
    keys = [known for known in _keys(OmegaConf.to_container(base, resolve=False)) if known != key]
    near = difflib.get_close_matches(key, keys, n=1)
    if not near:  # the right name in the wrong place, such as max_steps for run.max_steps
        near = [known for known in keys if known.rpartition(".")[2] == key.rpartition(".")[2]][:1]
    message = f"there is no setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ".")
    if key.startswith("params."):
        return f"{message} To add a new one, write +{key}=VALUE."
    return message if near else f"{message} The settings are: {', '.join(k for k in keys if '.' not in k)}."


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if prefix or key != "hydra":
            yield f"{prefix}{key}"
            if isinstance(value, dict):
                yield from _keys(value, f"{prefix}{key}.")
