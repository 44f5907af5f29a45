"""Warm start: a module that was just built, on the host, gets weights of another training."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tpuspec.checkpoint.foreign import NamedTensor, open_tensors
from tpuspec.errors import CheckpointError, ConfigError
from tpuspec.spec.warm_start import VocabInfo, WarmStartSettings

logger = logging.getLogger(__name__)

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MOST_NAMES = 8


@dataclass(slots=True)
class WarmStarted:
    """What a warm start did.

    Attributes:
      loaded: name in the model -> name in the checkpoint.
      kept: name in the model -> why it has its initial value.
      unused: names in the checkpoint that nothing in the model has.
    """

    loaded: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    def lines(self) -> Iterable[str]:
        """Yields what to tell people: how much was loaded, and what was not, by its reason."""
        yield f"loaded {len(self.loaded)} of {len(self.loaded) + len(self.kept)} tensors"
        for reason in dict.fromkeys(self.kept.values()):
            yield f"not loaded, {reason}: {_some([name for name, why in self.kept.items() if why == reason])}"
        if self.unused:
            yield f"not in the model: {_some(self.unused)}"


def warm_start(module: nn.Module | None, settings: WarmStartSettings, tell: Callable[[str], object]) -> WarmStarted:
    """Loads weights into a module on the host, in place, cast to its dtypes; all or none.

    Args:
      module: just built.
      settings: which.
      tell: takes what was loaded, and what was not.

    Raises:
      ConfigError: a pattern or a name matches nothing in the model.
      CheckpointError: the weights cannot be read, or do not fit; nothing was loaded.
    """
    where = os.fspath(settings.ckpt_to_initialize_from)
    if module is None:
        raise ConfigError("warm_start_from needs a model to load weights into; the Trainer has none.")
    tensors = _targets(module)
    chosen = _chosen(module, tensors, settings)
    with open_tensors(where) as stored:
        done = _match(tensors, chosen, stored, settings)
        _check_fits(tensors, done.loaded, stored, settings, where)
        with torch.no_grad():
            for name, old_name in done.loaded.items():
                _fill(tensors[name], stored[old_name], (settings.var_name_to_vocab_info or {}).get(name))
                logger.info("warm start: %s <- %s, %s %s", name, old_name, list(stored[old_name].shape),
                            stored[old_name].dtype)
    for name, reason in done.kept.items():
        logger.info("warm start: %s keeps its initial value: %s", name, reason)
    tell(f"warm start from {where}: " + "\n  ".join(done.lines()))
    return done


def _targets(module: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and the buffers that checkpoints have; one that modules share has several names."""
    found: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    saved = module.state_dict(keep_vars=True)
    return found | {name: buffer for name, buffer in module.named_buffers(remove_duplicate=False) if name in saved}


def _chosen(module: nn.Module, tensors: Mapping[str, Tensor], settings: WarmStartSettings) -> dict[str, str]:
    """Returns of each tensor why it is not to be loaded; '' where it is."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for what, names in (("var_name_to_prev_var_name", settings.var_name_to_prev_var_name),
                        ("var_name_to_vocab_info", settings.var_name_to_vocab_info)):
        for name in names or {}:
            if name not in tensors:
                raise ConfigError(f"{what} names {name!r}, which the model does not have{_near(name, tensors)}.")
    candidates = [name for name in tensors if settings.takes_buffers or name in parameters]
    for pattern in settings.patterns:
        if not any(re.match(pattern, name) for name in candidates):
            raise ConfigError(f"vars_to_warm_start={pattern!r} matches no "
                              f"{'parameter or buffer' if settings.takes_buffers else 'parameter'} of the model"
                              f"{_near(pattern, candidates)}. It must match from the start of a name.")
    reasons = {}
    for name in tensors:
        if name not in candidates:
            reasons[name] = "a buffer, which only a list vars_to_warm_start=['.*'] takes"
        elif not any(re.match(pattern, name) for pattern in settings.patterns):
            reasons[name] = "left out by vars_to_warm_start"
        else:
            reasons[name] = ""
    for name in {*(settings.var_name_to_prev_var_name or {}), *(settings.var_name_to_vocab_info or {})}:
        if reasons[name]:
            raise ConfigError(f"{name!r} has a setting for its warm start, and is not loaded: it is {reasons[name]}.")
    return reasons


def _match(tensors: Mapping[str, Tensor], chosen: Mapping[str, str], stored: Mapping[str, NamedTensor],
           settings: WarmStartSettings) -> WarmStarted:
    done, previous = WarmStarted(), settings.var_name_to_prev_var_name or {}
    for name, reason in chosen.items():
        old_name = previous.get(name, name)
        if reason:
            done.kept[name] = reason
        elif old_name in stored:
            done.loaded[name] = old_name
        elif name in previous:
            raise CheckpointError(f"var_name_to_prev_var_name[{name!r}] is {old_name!r}, which is not in "
                                  f"{settings.ckpt_to_initialize_from}{_near(old_name, stored)}.")
        else:
            done.kept[name] = "not in the checkpoint"
    shared = {id(tensors[name]) for name in done.loaded}
    done.kept = {name: reason for name, reason in done.kept.items() if id(tensors[name]) not in shared}
    done.unused = [name for name in stored if name not in set(done.loaded.values()) and name not in tensors]
    if not done.loaded:
        raise CheckpointError(
            f"warm_start_from {settings.ckpt_to_initialize_from} has no tensor of a name that is to be loaded: it has "
            f"{_some(list(stored), 3)}; the model has {_some(list(tensors), 3)}. var_name_to_prev_var_name maps names.")
    return done


def _check_fits(tensors: Mapping[str, Tensor], loaded: Mapping[str, str], stored: Mapping[str, NamedTensor],
                settings: WarmStartSettings, where: str) -> None:
    infos, problems = settings.var_name_to_vocab_info or {}, []
    for name, old_name in loaded.items():
        own, found = tensors[name], stored[old_name]
        if own.is_meta:
            problems.append(f"{name} of the model has no memory, it is on the meta device")
        if found.dtype not in (_FLOATS if own.is_floating_point() else (own.dtype,)):
            problems.append(f"{name} is {own.dtype} in the model, {found.dtype} in the checkpoint; only floats "
                            "are cast")
        elif name in infos and own.ndim and own.shape[1:] == found.shape[1:]:
            problems += _row_problems(name, own, found, infos[name])
        elif own.shape != found.shape:
            problems.append(f"{name} is {list(own.shape)} in the model, {list(found.shape)} in the checkpoint")
    if not problems:
        problems = _conflicts(tensors, loaded, stored)
    if problems:
        raise CheckpointError(
            f"Warm start from {where} failed; nothing was loaded:\n" + "\n".join(f"  {each}" for each in problems)
            + "\nLeave a tensor out by vars_to_warm_start, such as '(?!head)'; var_name_to_vocab_info takes embeddings "
              "of another vocabulary.")


def _conflicts(tensors: Mapping[str, Tensor], loaded: Mapping[str, str],
               stored: Mapping[str, NamedTensor]) -> list[str]:
    """Names what the model has as one tensor, and the checkpoint as two that differ."""
    first: dict[int, str] = {}
    for name in loaded:
        first.setdefault(id(tensors[name]), name)
    shared = [(first[id(tensors[name])], name) for name in loaded if first[id(tensors[name])] != name]
    return [f"{one} and {other} are one tensor in the model, and differ in the checkpoint" for one, other in shared
            if not torch.equal(stored[loaded[one]].read(), stored[loaded[other]].read())]


def _row_problems(name: str, own: Tensor, found: NamedTensor, info: VocabInfo) -> list[str]:
    tokens = info.tokens()
    if tokens is None:
        return [] if found.shape[0] <= own.shape[0] else [
            f"{name} has {own.shape[0]} rows in the model, fewer than the checkpoint's {found.shape[0]}: give the "
            "vocabularies"]
    return [f"{name} has {num_rows} rows in the {place}, and its vocabulary {len(names)} tokens"
            for place, num_rows, names in (
                ("model", own.shape[0], tokens[0]), ("checkpoint", found.shape[0], tokens[1]))
            if num_rows != len(names)]


def _fill(own: Tensor, found: NamedTensor, info: VocabInfo | None) -> None:
    values, tokens = found.read(), None if info is None else info.tokens()
    if tokens is None:
        own[:len(values)].copy_(values) if info is not None else own.copy_(values)
        return
    places = {token: place for place, token in enumerate(tokens[1])}
    rows = [(new, places[token]) for new, token in enumerate(tokens[0]) if token in places]
    own[[new for new, _ in rows]] = values[[old for _, old in rows]].to(own.dtype)


def _some(names: list[str], most: int = _MOST_NAMES) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _near(name: str, names: Iterable[str]) -> str:
    known = list(names)
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f": it has {_some(known, 3)}"
