"""Warm start: which weights a training that has no checkpoint yet begins with."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tpuspec.errors import ConfigError

ALL = ".*"


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabInfo:
    """How the rows of an embedding, or of a head, are those of a model with another vocabulary.

    Attributes:
      new_vocab, old_vocab: tokens of the rows in the model and in the checkpoint: a sequence, or the path of a text
        file with a token a line. Rows of tokens that the old vocabulary lacks keep their initial values. Without both,
        the checkpoint's rows are the first ones of the model.

    Raises:
      ConfigError: only one of them is given.

    Source: tf.estimator.VocabInfo.
    """

    new_vocab: Sequence[str] | str | os.PathLike[str] | None = None
    old_vocab: Sequence[str] | str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if (self.new_vocab is None) != (self.old_vocab is None):
            raise ConfigError("VocabInfo needs new_vocab and old_vocab, or neither: without both, the checkpoint's "
                              "rows are the first ones of the model.")

    def tokens(self) -> tuple[list[str], list[str]] | None:
        """Returns the new and the old tokens; None without them.

        Raises:
          ConfigError: a file cannot be read.
        """
        if self.new_vocab is None or self.old_vocab is None:
            return None
        return _tokens(self.new_vocab), _tokens(self.old_vocab)


def _tokens(vocab: Sequence[str] | str | os.PathLike[str]) -> list[str]:
    if not isinstance(vocab, str | os.PathLike):
        return list(vocab)
    try:
        return Path(vocab).read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"VocabInfo: the vocabulary {os.fspath(vocab)!r} cannot be read: {error}") from error


@dataclass(frozen=True, slots=True)
class WarmStartSettings:
    """Which weights to begin with, and under which names; only where model_dir has no checkpoint.

    Attributes:
      ckpt_to_initialize_from: a checkpoint of tpuspec, a model_dir (its newest one), an export, a safetensors file, a
        folder with model.safetensors or model.safetensors.index.json (Hugging Face's), or a state dict of torch.save.
      vars_to_warm_start: regular expression; parameters whose names begin with a match are loaded. A list of several
        loads buffers too, such as BatchNorm's statistics.
      var_name_to_vocab_info: parameter -> VocabInfo, where its rows are those of another vocabulary.
      var_name_to_prev_var_name: parameter -> its name in the checkpoint, where that is another one.

    Raises:
      ConfigError: a setting breaks a rule.

    Source: tf.estimator.WarmStartSettings.
    """

    ckpt_to_initialize_from: str | os.PathLike[str]
    vars_to_warm_start: str | Sequence[str] = ALL
    var_name_to_vocab_info: Mapping[str, VocabInfo] | None = None
    var_name_to_prev_var_name: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        path = self.ckpt_to_initialize_from
        if not isinstance(path, str | os.PathLike) or not os.fspath(path):
            raise ConfigError(f"`ckpt_to_initialize_from` MUST be set in WarmStartSettings, to a path; got {path!r}.")
        if not self.patterns or not all(isinstance(pattern, str) for pattern in self.patterns):
            raise ConfigError("vars_to_warm_start must be a regular expression, or a list of them; got "
                              f"{self.vars_to_warm_start!r}.")
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"vars_to_warm_start: {pattern!r} is no regular expression: {error}.") from error
        for name, info in (self.var_name_to_vocab_info or {}).items():
            if not isinstance(info, VocabInfo):
                raise ConfigError(f"var_name_to_vocab_info[{name!r}] must be a VocabInfo; got {info!r}.")

    @property
    def patterns(self) -> list[str]:
        """The regular expressions."""
        return [self.vars_to_warm_start] if isinstance(self.vars_to_warm_start, str) else list(self.vars_to_warm_start)

    @property
    def takes_buffers(self) -> bool:
        """Whether buffers are loaded too."""
        return not isinstance(self.vars_to_warm_start, str)


def check_warm_start(value: object) -> WarmStartSettings | None:
    """Returns the settings that were given; a path is one of all parameters.

    Raises:
      ConfigError: it is something else.
    """
    if value is None or isinstance(value, WarmStartSettings):
        return value
    if isinstance(value, str | os.PathLike):
        return WarmStartSettings(value)
    raise ConfigError(f"`warm_start_from` must be a string or a WarmStartSettings, or None; got {value!r}.")


def parse_warm_start(value: Any) -> WarmStartSettings | None:
    """Returns the settings of a config file: a path, or a mapping with the names of WarmStartSettings.

    Raises:
      ConfigError: a name is unknown, or a setting breaks a rule.
    """
    if not isinstance(value, Mapping):
        return check_warm_start(value)
    known = [field.name for field in fields(WarmStartSettings)]
    _check_names("warm_start_from", value, known)
    if known[0] not in value:
        raise ConfigError(f"warm_start_from needs {known[0]}, a path; got the names {sorted(map(str, value))}.")
    infos = value.get("var_name_to_vocab_info") or {}
    for name, info in infos.items():
        _check_names(f"warm_start_from.var_name_to_vocab_info.{name}", info or {}, ["new_vocab", "old_vocab"])
    return WarmStartSettings(**{
        **value, "var_name_to_vocab_info": {name: VocabInfo(**(info or {})) for name, info in infos.items()}})


def _check_names(where: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise ConfigError(f"{where} has no {name!r}; it has {', '.join(known)}.")
