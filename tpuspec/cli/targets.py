"""Dotted names in a config, resolved only below allowed prefixes: a config file may come from a stranger."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tpuspec.cli.schema import TrainConfig
from tpuspec.cli.values import ABSENT, fit
from tpuspec.errors import ConfigError, ConfigTypeError
from tpuspec.spec.functions import ModelFactory, OptimizerFactory, SchedulerFactory

BUILT_IN_PREFIXES = ("tpuspec.", "torch.optim.")
TARGET_KEY = "_target_"
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)
_PREFIX = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\.?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Functions:
    """The user's functions, as the Trainer takes them."""

    model_fn: Callable[..., Any]
    input_fn: Callable[..., Any]
    model: ModelFactory | None
    optimizer: OptimizerFactory | None
    scheduler: SchedulerFactory | None
    serving_input_fn: Callable[..., Any] | None
    report: Callable[..., Any] | None


def allowed_prefixes(extra: Iterable[str] = ()) -> tuple[str, ...]:
    """Returns the built-in prefixes and the user's own, each with its final dot.

    Raises:
      ConfigError: an extra one is no dotted name.
    """
    prefixes: list[str] = list(BUILT_IN_PREFIXES)
    for prefix in extra:
        if not isinstance(prefix, str) or not _PREFIX.fullmatch(prefix):
            raise ConfigError(f"allow takes names of packages, such as allow=[mypackage.]; got {prefix!r}.")
        prefixes.append(prefix if prefix.endswith(".") else prefix + ".")
    return tuple(prefixes)


def resolve_functions(settings: TrainConfig, prefixes: tuple[str, ...]) -> Functions:
    """Imports the functions that `settings` names, after all of the names are checked.

    Args:
      settings: composed settings.
      prefixes: as allowed_prefixes returns them.

    Raises:
      ConfigError: a name is outside the prefixes, does not exist, or is an alias of something outside; params hold a
        `_target_`; the arguments of optimizer or scheduler do not fit its class.
      ConfigTypeError: a name is no string, or what it names is no function or class.
    """
    targets = {"optimizer": _split("optimizer", settings.optimizer, "torch.optim.AdamW"),
               "scheduler": _split("scheduler", settings.scheduler, "torch.optim.lr_scheduler.CosineAnnealingLR")}
    refuse_targets(settings.params, "params")
    for setting, (_, keywords) in targets.items():
        refuse_targets(keywords, setting)
    names = {"model_fn": settings.model_fn, "input_fn": settings.input_fn, "model": settings.model,
             "serving_input_fn": settings.serving_input_fn, "report": settings.report,
             **{setting: name for setting, (name, _) in targets.items()}}
    for setting, name in names.items():
        if name is not None:
            check_target(setting, name, prefixes)
    found = {setting: None if name is None else resolve(setting, name, prefixes) for setting, name in names.items()}
    for setting, example in (("optimizer", "lr: 0.001"), ("scheduler", "T_max: 1000")):
        name, keywords = targets[setting]
        if isinstance(getattr(settings, setting), Mapping):
            make = _optimizer_factory if setting == "optimizer" else _scheduler_factory
            found[setting] = make(str(name), found[setting], keywords)
        elif inspect.isclass(found[setting]):
            raise ConfigError(f"{setting}={name} is a class; write it as {setting}={{_target_: {name}, {example}}}.")
    return Functions(model_fn=_needed("model_fn", found), input_fn=_needed("input_fn", found), model=found["model"],
                     optimizer=found["optimizer"], scheduler=found["scheduler"],
                     serving_input_fn=found["serving_input_fn"], report=found["report"])


def _needed(setting: str, found: Mapping[str, Callable[..., Any] | None]) -> Callable[..., Any]:
    function = found[setting]
    assert function is not None  # the schema makes it mandatory
    return function


def check_target(setting: str, name: object, prefixes: tuple[str, ...]) -> None:
    """Checks a name against the allow-list, importing nothing.

    Raises:
      ConfigError: it is no dotted name, or it is outside the prefixes.
      ConfigTypeError: it is no string.
    """
    if not isinstance(name, str):
        raise ConfigTypeError(f"{setting} must be a dotted name such as tpuspec.recipes.digits.model_fn; got {name!r}.")
    if not _DOTTED.fullmatch(name):
        raise ConfigError(f"{setting} must be a dotted name such as tpuspec.recipes.digits.model_fn; got {name!r}.")
    if not name.startswith(prefixes):
        raise ConfigError(
            f"{setting}={name} is refused: names resolve only below {', '.join(prefixes)} If you trust it, allow it on "
            f"the command line: 'allow=[{name.split('.')[0]}.]'.")


def resolve(setting: str, name: str, prefixes: tuple[str, ...]) -> Callable[..., Any]:
    """Imports what a name names: a function or class that is itself defined below the prefixes.

    Raises:
      ConfigError: the name is outside the prefixes, does not exist, or is an alias of something outside.
      ConfigTypeError: what it names is no function or class.
    """
    check_target(setting, name, prefixes)
    module_name, _, attribute = name.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that the user's own module lacks is the user's error, and keeps its traceback.
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise
        raise ConfigError(f"{setting}={name}: there is no module {error.name!r}. Check the name; a module is looked "
                          "for in the current folder and in the installed packages.") from error
    if not hasattr(module, attribute):
        raise ConfigError(f"{setting}={name}: module {module_name} has no {attribute!r}"
                          f"{did_you_mean(attribute, vars(module))}.")
    found = getattr(module, attribute)
    if not (inspect.isroutine(found) or inspect.isclass(found)):
        raise ConfigTypeError(f"{setting}={name} must name a function or a class; it is a {type(found).__name__}.")
    home = getattr(found, "__module__", None) or ""
    if not (home + ".").startswith(prefixes):
        raise ConfigError(f"{setting}={name} is refused: it is an alias of {home}.{found.__name__}, which is not below "
                          f"{', '.join(prefixes)}")
    return found


def refuse_targets(value: object, where: str) -> None:
    """Refuses a `_target_` anywhere in data.

    Raises:
      ConfigError: names where it stands.
    """
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, Mapping):
        if TARGET_KEY in value:
            raise ConfigError(f"{where}.{TARGET_KEY} is refused: {where} is data, nothing in it is called. Only "
                              "optimizer and scheduler take a _target_.")
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, item in items:
        refuse_targets(item, f"{where}.{key}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns '; did you mean X?' for the nearest known name, or nothing where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _split(setting: str, value: object, example: str) -> tuple[object, dict[str, Any]]:
    if not isinstance(value, Mapping):
        return value, {}
    if TARGET_KEY not in value:
        raise ConfigError(f"{setting} has no {TARGET_KEY}, such as {example}; got the keys {sorted(map(str, value))}.")
    return value[TARGET_KEY], {str(key): item for key, item in value.items() if key != TARGET_KEY}


def _optimizer_factory(name: str, cls: object, keywords: dict[str, Any]) -> OptimizerFactory:
    if not (inspect.isclass(cls) and issubclass(cls, Optimizer)):
        raise ConfigTypeError(f"optimizer._target_={name} must be a class of optimizers; for a function of "
                              f"(model, params) write optimizer={name}.")
    keywords = _checked_keywords("optimizer", name, cls, keywords, given="params")

    def make_optimizer(model: nn.Module | None, params: Mapping[str, Any]) -> Optimizer:
        if model is None:
            raise ConfigError(f"optimizer._target_={name} optimizes the model's parameters, and there is no model. "
                              "Set model, or make optimizer a function.")
        return cls(model.parameters(), **keywords)

    return make_optimizer


def _scheduler_factory(name: str, cls: object, keywords: dict[str, Any]) -> SchedulerFactory:
    if not (inspect.isclass(cls) and issubclass(cls, LRScheduler)):
        raise ConfigTypeError(f"scheduler._target_={name} must be a class of schedules; for a function of "
                              f"(optimizer, params) write scheduler={name}.")
    keywords = _checked_keywords("scheduler", name, cls, keywords, given="optimizer")

    def make_schedule(optimizer: Any, params: Mapping[str, Any]) -> LRScheduler:
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(f"scheduler._target_={name} is for one optimizer, and there are several by name. Make "
                              "scheduler a function of (optimizers, params) that returns a schedule for each.")
        return cls(optimizer, **keywords)

    return make_schedule


def _checked_keywords(setting: str, name: str, cls: type, keywords: Mapping[str, Any], *,
                      given: str) -> dict[str, Any]:
    """Returns the keywords as the types of the class's own defaults."""
    parameters = inspect.signature(cls).parameters
    known = [key for key in parameters if key != given]
    unknown = [key for key in keywords if key not in known]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise ConfigError(f"{setting}.{unknown[0]}: {name} takes no such argument"
                          f"{did_you_mean(unknown[0], known) or '; it takes ' + ', '.join(known)}")
    return {key: fit(f"{setting}.{key}", value, _default_of(parameters.get(key))) for key, value in keywords.items()}


def _default_of(parameter: inspect.Parameter | None) -> Any:
    if parameter is None or parameter.default is parameter.empty:
        return ABSENT
    # torch writes whole numbers for rates too: LBFGS(lr=1).
    return 0 if type(parameter.default) is int else parameter.default
