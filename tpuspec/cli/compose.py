"""Composes the settings of each job with Hydra, and puts its errors into one clear line.

Only Hydra's composition is used, never its runner: a run needs no outputs/ folder, no .hydra folder and no log files of
Hydra's, and nothing below the `hydra` node (callbacks, launchers) may name code to call.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from tpuspec.cli.choices import GROUP, PACKAGED_CONFIGS, Choice, check_choice, find_choices, format_choices
from tpuspec.cli.explain import ALLOW, COMPOSITION_ERRORS, explained, unknown_key
from tpuspec.cli.schema import RunSettings, TrainConfig, check_settings, register_schema, run_config
from tpuspec.cli.targets import allowed_prefixes
from tpuspec.cli.values import ABSENT, fit
from tpuspec.config import TPUConfig
from tpuspec.errors import ConfigError

_PRIMARY = "train"
_STRUCTURED = {"": TrainConfig, "run": RunSettings, "tpu": TPUConfig}
_UNTYPED = ("params", "optimizer", "scheduler")
_LONGEST_FOLDER_NAME = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run, composed and checked.

    Attributes:
      name: what tells it from the other jobs of a sweep; '' for a run alone.
      settings: its settings.
      prefixes: where dotted names may resolve.
      resolved: its settings as YAML, every interpolation resolved.
    """

    name: str
    settings: TrainConfig
    prefixes: tuple[str, ...]
    resolved: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """A job while it is composed: `swept` are those of its overrides that the sweep varies."""

    choice: str
    swept: list[str]
    config: DictConfig


def compose_jobs(overrides: Sequence[str], *, config_dir: Path | None, multirun: bool, now: datetime) -> list[Job]:
    """Composes every job of a command before the first one runs.

    Args:
      overrides: key=value arguments.
      config_dir: the user's own configs.
      multirun: whether comma lists are sweeps.
      now: names the folder of a sweep.

    Raises:
      ConfigError: the command, a file or a value breaks a rule; the message has the nearest key or choice.
    """
    choices = find_choices(config_dir)
    parsed = _parse(overrides)
    prefixes = allowed_prefixes(_take_allowed(parsed))
    num_chosen = sum(override.key_or_group == GROUP for override in parsed)
    if num_chosen != 1:
        raise ConfigError("config= is given twice; one of them would be ignored." if num_chosen else
                          _no_config(parsed, choices))
    register_schema()
    drafts = [_draft(texts, swept, number, config_dir, choices)
              for number, (texts, swept) in enumerate(_combinations(parsed, multirun))]
    if multirun:
        _separate(drafts, now)
    given = [override.key_or_group for override in parsed]
    jobs = [_job(draft, prefixes, given, multirun=multirun, number=i) for i, draft in enumerate(drafts)]
    _check_one_device_setup(jobs)
    return jobs


def _parse(overrides: Sequence[str]) -> list[Override]:
    parser, parsed = OverridesParser.create(), []
    for text in overrides:
        try:
            parsed.extend(parser.parse_overrides([text]))
            if not parsed[-1].key_or_group:
                raise HydraException("there is no key")
        except HydraException as error:
            raise ConfigError(f"cannot read the argument {text!r}. Arguments are key=value; a value with spaces, "
                              "brackets or = needs quotes of its own, such as 'model_dir=\"my runs\"'.") from error
        key = parsed[-1].key_or_group
        if re.match(r"hydra([./@]|$)", key):
            raise ConfigError(f"{key} is Hydra's own setting and would be ignored: tpuspec runs each job itself, in "
                              "this folder, and writes below model_dir. Use model_dir=DIR, or --config-dir DIR for "
                              "more configs.")
    return parsed


def _take_allowed(parsed: list[Override]) -> list[str]:
    """Removes `allow=` from the overrides: it has no place in the settings, so that no file can set it."""
    allowed: list[str] = []
    for override in [o for o in parsed if o.key_or_group == ALLOW]:
        parsed.remove(override)
        value = None if override.is_sweep_override() or override.is_delete() else override.value()
        if not isinstance(value, str | list):
            raise ConfigError(f"allow takes a list of packages, allow=[mypackage.,other.]; got {override.input_line}.")
        allowed.extend([value] if isinstance(value, str) else value)  # type: ignore[arg-type]
    return allowed


def _no_config(parsed: list[Override], choices: dict[str, Choice]) -> str:
    near = [o.key_or_group for o in parsed if difflib.get_close_matches(o.key_or_group, [GROUP])]
    hint = f" (you wrote {near[0]}=)" if near else ""
    return (f"config= is missing{hint}: python -m tpuspec.train config=NAME\n{format_choices(choices)}\n"
            "--help explains modes and settings; --config-dir DIR adds your own configs.")


def _combinations(parsed: list[Override], multirun: bool) -> Iterator[tuple[list[str], list[str]]]:
    """Yields each job's overrides, and which of them are swept."""
    axes: list[list[tuple[str, bool]]] = []
    for override in parsed:
        if not multirun or not override.is_sweep_override():
            axes.append([(override.input_line or "", False)])
        elif override.is_choice_sweep() or override.is_range_sweep():
            key = override.get_key_element()
            axes.append([(f"{key}={value}", True) for value in override.sweep_string_iterator()])
        else:
            raise ConfigError(f"{override.input_line}: only lists and range() can be swept.")
    for combination in itertools.product(*axes):
        yield [text for text, _ in combination], [text for text, is_swept in combination if is_swept]


def _draft(overrides: list[str], swept: list[str], number: int, config_dir: Path | None,
           choices: dict[str, Choice]) -> _Draft:
    choice = next(str(o.value()) for o in _parse(overrides) if o.key_or_group == GROUP)
    if "," not in choice:  # a list without --multirun: Hydra's own message is the better one
        check_choice(choice, choices)
    search = [] if config_dir is None else [f"hydra.searchpath=[{_quoted('file://' + str(config_dir.resolve()))}]"]
    with initialize_config_dir(str(PACKAGED_CONFIGS), job_name=_PRIMARY, version_base="1.3"):
        try:
            config = compose(_PRIMARY, [*overrides, *search], return_hydra_config=True)
            _check_hydra_untouched(config, choices[choice])
            _resolve(config, number)
            _fit_values(config, compose(_PRIMARY, [f"{GROUP}={choice}", *search]))
        except COMPOSITION_ERRORS as error:
            raise explained(error, choices, lambda: compose(_PRIMARY, [f"{GROUP}={choice}", *search])) from error
    _check_keys(config)
    return _Draft(choice=choice, swept=swept, config=config)


def _fit_values(config: DictConfig, base: DictConfig) -> None:
    """Holds the data that the schema knows no type of against the types of the chosen file's own."""
    for key in _UNTYPED:
        if isinstance(config[key], DictConfig):
            default = OmegaConf.to_container(base[key], resolve=False) if isinstance(base[key], DictConfig) else ABSENT
            config[key] = fit(key, OmegaConf.to_container(config[key]), default)


def _resolve(config: DictConfig, number: int) -> None:
    """Resolves every interpolation, ${hydra:...} included, and takes Hydra's own node away."""
    with open_dict(config):
        config.hydra.job.num = number
        config.hydra.job.id = str(number)
    HydraConfig.instance().set_config(config)
    try:
        with open_dict(config):
            del config["hydra"]
        OmegaConf.resolve(config)
    finally:
        HydraConfig.instance().cfg = None


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _check_hydra_untouched(config: DictConfig, choice: Choice) -> None:
    plain: Any = OmegaConf.to_container(compose(overrides=[], return_hydra_config=True).hydra, resolve=False)
    found: Any = OmegaConf.to_container(config.hydra, resolve=False)
    changed = [key for key in found if key not in ("job", "overrides", "runtime", "searchpath")
               and found[key] != plain.get(key)]
    if changed:
        raise ConfigError(f"{choice.path}: hydra.{changed[0]} is Hydra's own setting and would be ignored; leave it "
                          "out. tpuspec runs each job itself and writes below model_dir.")


def _check_keys(config: DictConfig) -> None:
    """Refuses the unknown keys that Hydra lets through: those added by + or ++."""
    for where, schema in _STRUCTURED.items():
        known = {f.name for f in dataclasses.fields(schema)}
        for key in config[where] if where else config:
            if key not in known:
                raise ConfigError(unknown_key(f"{where}.{key}" if where else str(key), config))


def _separate(drafts: list[_Draft], now: datetime) -> None:
    """Gives each job of a sweep its own model_dir, unless the jobs' own are all different."""
    given = [draft.config.model_dir for draft in drafts]
    if None not in given and len(set(given)) == len(drafts):
        return
    for number, draft in enumerate(drafts):
        parent = draft.config.model_dir or f"runs/{draft.choice}_sweep/{now:%Y-%m-%d_%H-%M-%S}"
        draft.config.model_dir = f"{parent}/{_folder_name(number, draft.swept)}"


def _check_one_device_setup(jobs: list[Job]) -> None:
    """Refuses a sweep over the number of devices: the jobs share a process, which starts its devices once."""
    tpus = [job.settings.tpu for job in jobs if job.settings.use_tpu]
    for name in ("num_shards", "num_cores_per_replica", "mesh"):
        if len({str(getattr(tpu, name)) for tpu in tpus}) > 1:
            raise ConfigError(f"tpu.{name} cannot be swept: all jobs run in one process, and a process starts its "
                              "devices once. Run one command for each value.")


def _folder_name(number: int, swept: list[str]) -> str:
    return re.sub(r"[^\w.=,+-]", "_", "_".join([str(number), *swept]))[:_LONGEST_FOLDER_NAME]


def _job(draft: _Draft, prefixes: tuple[str, ...], given: list[str], *, multirun: bool, number: int) -> Job:
    config = draft.config
    if config.model_dir is None:
        config.model_dir = f"runs/{draft.choice}"
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"{missing[0]} is not set; config={draft.choice} must set it, or the command line.")
    settings = OmegaConf.to_object(config)
    assert isinstance(settings, TrainConfig)
    if not settings.model_dir or "\0" in settings.model_dir:
        raise ConfigError(f"model_dir must be a folder, or an address such as gs://bucket/run; got "
                          f"{settings.model_dir!r}.")
    check_settings(settings, given)
    # The record says what the run will do: the distance between checkpoints that RunConfig makes of its defaults.
    resolved = run_config(settings)
    config.run.save_checkpoints_steps = resolved.save_checkpoints_steps
    config.run.save_checkpoints_secs = resolved.save_checkpoints_secs
    return Job(name=_folder_name(number, draft.swept) if multirun else "", settings=settings, prefixes=prefixes,
               resolved=OmegaConf.to_yaml(config))
