"""The settings of `python -m tpuspec.train` as structured configs; run and tpu take their fields from the library's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from tpuspec.config import RunConfig, TPUConfig
from tpuspec.errors import ConfigError
from tpuspec.spec.names import check_name
from tpuspec.spec.warm_start import WarmStartSettings, parse_warm_start

SCHEMA_NAME = "schema"
# These have their own places: `model_dir`, `tpu`, `quiet` and `device`.
_NOT_IN_RUN = ("model_dir", "tpu_config", "show_progress", "device")


class Mode(Enum):
    """What one command does."""

    train = "train"
    evaluate = "evaluate"
    predict = "predict"
    train_and_evaluate = "train_and_evaluate"
    export = "export"
    plan = "plan"


class ExporterKind(Enum):
    """Which evaluated checkpoints are exported."""

    best = "best"
    latest = "latest"
    final = "final"


@dataclass
class ExportSettings:
    """Exports for serving.

    Attributes:
      folder: below which exports lie; None takes model_dir/export, where that is a folder of this machine.
      name: of the exports of mode=export, which go to folder/name/<seconds since 1970>.
      checkpoint_path: what mode=export exports; None takes the newest checkpoint.
      to_tpu, to_cpu: whether there is a program for XLA devices, and one for CPUs and GPUs.
      exporters: of mode=train_and_evaluate; each exports to model_dir/export/<its kind>.
      exports_to_keep: of each but final; None keeps all.
      metric: which the best exporter compares.
      higher_is_better: how it does.
    """

    folder: str | None = None
    name: str = "serving"
    checkpoint_path: str | None = None
    to_tpu: bool = True
    to_cpu: bool = True
    exporters: list[ExporterKind] = field(default_factory=list)
    exports_to_keep: int | None = 5
    metric: str = "loss"
    higher_is_better: bool = False


@dataclass
class PlanSettings:
    """What mode=plan compiles for.

    Attributes:
      topology: a TPU generation and its chips along each side, such as v5e:2x2; or a list of them.
      batch: 'largest' looks for the largest batch of each mode that fits; None takes the batch sizes of the run.
      modes: train, eval and predict, or some of these.
    """

    topology: Any = None
    batch: str | None = None
    modes: list[str] = field(default_factory=lambda: ["train", "eval"])


def _run_config_fields() -> list[tuple[str, Any, Any]]:
    hints = get_type_hints(RunConfig)
    return [(f.name, hints[f.name], field(default=f.default, default_factory=f.default_factory))
            if f.default_factory is not dataclasses.MISSING else (f.name, hints[f.name], field(default=f.default))
            for f in dataclasses.fields(RunConfig) if f.name not in _NOT_IN_RUN]


RunSettings: type = dataclasses.make_dataclass(
    "RunSettings",
    [*_run_config_fields(),
     ("max_steps", int | None, field(default=None)),
     ("steps", int | None, field(default=None)),
     ("eval_steps", int | None, field(default=None))],
    namespace={"__doc__": "RunConfig's fields, and how far to train (max_steps, or steps more) and to evaluate."})


@dataclass
class TrainConfig:
    """All settings of one run.

    Attributes:
      mode: what to do.
      model_dir: folder of checkpoints and logs; None takes runs/<name of the config>.
      model_fn, input_fn, model: dotted names of functions.
      optimizer: dotted name of a function (model, params) -> Optimizer, or {_target_: torch.optim class, lr: ...}.
      scheduler: dotted name of a function (optimizer, params) -> LRScheduler, or {_target_: torch.optim.lr_scheduler
        class, ...}.
      serving_input_fn: dotted name of a function that returns a tpuspec.ServingInputReceiver, for exports.
      report: dotted name of a function (trainer) that tells of the trained model, once train or train_and_evaluate is
        done.
      params: the Trainer's params; data only.
      train_batch_size, eval_batch_size, predict_batch_size: global batch sizes.
      batch_axis: the axis of the rows in the input's tensors, as the Trainer takes it; None is axis 0.
      use_tpu, eval_on_tpu: whether training, and evaluation, run on XLA devices.
      device: 'cpu' or 'cuda': plain PyTorch there, which sets use_tpu to false; None leaves it to use_tpu.
      quiet: whether to print results only.
      warm_start_from: weights to begin with where model_dir has no checkpoint: a path, or the fields of
        tpuspec.WarmStartSettings.
      export: where exports go, and which programs they have.
      plan: which chips mode=plan compiles for.
      run: RunConfig, and the number of steps.
      tpu: TPUConfig.
    """

    mode: Mode = Mode.train_and_evaluate
    model_dir: str | None = None
    model_fn: str = MISSING
    input_fn: str = MISSING
    model: str | None = None
    optimizer: Any = None
    scheduler: Any = None
    serving_input_fn: str | None = None
    report: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    train_batch_size: int | None = None
    eval_batch_size: int | None = None
    predict_batch_size: int | None = None
    batch_axis: Any = None
    use_tpu: bool = True
    eval_on_tpu: bool = True
    device: str | None = None
    quiet: bool = False
    warm_start_from: Any = None
    export: ExportSettings = field(default_factory=ExportSettings)
    plan: PlanSettings = field(default_factory=PlanSettings)
    run: RunSettings = field(default_factory=RunSettings)  # pyright: ignore[reportInvalidTypeForm]
    tpu: TPUConfig = field(default_factory=TPUConfig)


def register_schema() -> None:
    """Makes the schema known to Hydra, under the name that tpuspec/configs/train.yaml uses."""
    ConfigStore.instance().store(name=SCHEMA_NAME, node=TrainConfig, provider="tpuspec")


def run_config(settings: TrainConfig) -> RunConfig:
    """Returns the RunConfig of `settings`.

    Raises:
      ConfigError: RunConfig refuses a value.
    """
    values = {name: getattr(settings.run, name) for name, _, _ in _run_config_fields()}
    return RunConfig(**values, model_dir=settings.model_dir, tpu_config=settings.tpu, show_progress=not settings.quiet,
                     device=settings.device)


_OF_EXPORTS = ("serving_input_fn", *(f"export.{f.name}" for f in dataclasses.fields(ExportSettings)))
_OF_WARM_STARTS = ("warm_start_from", *(f"warm_start_from.{f.name}" for f in dataclasses.fields(WarmStartSettings)))
_OF_PLANS = tuple(f"plan.{f.name}" for f in dataclasses.fields(PlanSettings))
_OF_EXPORTERS = ("export.exporters", "export.exports_to_keep", "export.metric", "export.higher_is_better")
_WITHOUT_EFFECT = {
    Mode.train: ("run.eval_steps", "eval_batch_size", "eval_on_tpu", "predict_batch_size", *_OF_EXPORTS),
    Mode.evaluate: ("run.max_steps", "run.steps", "predict_batch_size", *_OF_EXPORTS),
    Mode.predict: ("run.max_steps", "run.steps", "run.eval_steps", "eval_batch_size", *_OF_EXPORTS),
    Mode.train_and_evaluate: ("run.steps", "predict_batch_size", "export.folder", "export.name",
                              "export.checkpoint_path"),
    Mode.export: ("run.max_steps", "run.steps", "run.eval_steps", "eval_batch_size", "predict_batch_size",
                  "eval_on_tpu", *_OF_EXPORTERS),
    Mode.plan: ("run.max_steps", "run.steps", "run.eval_steps", "eval_on_tpu", *_OF_EXPORTS,
                *_OF_WARM_STARTS),
}
for _mode in set(Mode) - {Mode.plan}:
    _WITHOUT_EFFECT[_mode] += _OF_PLANS
_KEEPS, _COMPARES = (ExporterKind.best, ExporterKind.latest), (ExporterKind.best,)
# What mode=train_and_evaluate ignores, unless there is an exporter of one of these kinds.
_OF_KINDS = {"serving_input_fn": tuple(ExporterKind), "export.to_tpu": tuple(ExporterKind),
             "export.to_cpu": tuple(ExporterKind), "export.exports_to_keep": _KEEPS, "export.metric": _COMPARES,
             "export.higher_is_better": _COMPARES}


def check_settings(settings: TrainConfig, given: Iterable[str]) -> None:
    """Checks what the parts cannot check alone, and builds the RunConfig once to check it.

    Args:
      settings: composed settings.
      given: keys set on the command line; a file may hold the settings of every mode.

    Raises:
      ConfigError: a setting that this mode would ignore was given, or one that it needs is missing.
    """
    mode = settings.mode
    parse_warm_start(settings.warm_start_from)
    ignored = [key for key in given if key in _WITHOUT_EFFECT[mode]]
    if ignored:
        raise ConfigError(f"{ignored[0]} has no effect with mode={mode.name}; leave it out, or choose another mode.")
    if mode is Mode.plan:
        _check_plan(settings)
    if mode is Mode.train_and_evaluate:
        _check_exporters_of(given, settings.export.exporters)
    run = settings.run
    if mode is Mode.export or (mode is Mode.train_and_evaluate and settings.export.exporters):
        _check_export(settings)
    if mode is Mode.train and run.steps is not None and run.max_steps is not None:
        raise ConfigError(f"run.steps={run.steps} and run.max_steps={run.max_steps} are both set, and mean different "
                          "ends. Set the other to null, for example run.max_steps=null.")
    if mode is Mode.train_and_evaluate and run.max_steps is None:
        raise ConfigError("mode=train_and_evaluate needs run.max_steps, the step at which training is complete; it is "
                          "not set. Give run.max_steps=1000, or take mode=train with run.steps.")
    for name in ("max_steps", "steps", "eval_steps"):
        value = getattr(run, name)
        if value is not None and value <= 0:
            raise ConfigError(f"run.{name} must be positive, or null; got {value}.")
    if settings.device is not None:
        if "use_tpu" in given and settings.use_tpu:
            raise ConfigError(f"device={settings.device} is plain PyTorch, and use_tpu=true asks for XLA's devices. "
                              "Leave one of them out.")
        settings.use_tpu = settings.eval_on_tpu = False
    run_config(settings)


def _check_exporters_of(given: Iterable[str], exporters: Iterable[ExporterKind]) -> None:
    for key in given:
        kinds = _OF_KINDS.get(key)
        if kinds is not None and not set(kinds) & set(exporters):
            raise ConfigError(f"{key} has no effect with mode=train_and_evaluate, unless export.exporters has "
                              f"{' or '.join(kind.name for kind in kinds)}; leave it out, or add one.")


def _check_plan(settings: TrainConfig) -> None:
    named = settings.plan.topology
    names = [named] if isinstance(named, str) else list(named or [])
    if not names or not all(isinstance(name, str) for name in names):
        raise ConfigError("mode=plan needs plan.topology, a TPU generation and its chips along each side, or a list of "
                          f"them; got {named!r}. Give plan.topology=v5e:2x2, or plan.topology=[v5e:2x2,v6e:2x2].")
    settings.plan.topology = names
    if not settings.use_tpu or settings.device is not None:
        raise ConfigError("mode=plan compiles for TPU chips, and use_tpu=false (or device=) asks for plain PyTorch. "
                          "Leave that out.")


def _check_export(settings: TrainConfig) -> None:
    if settings.serving_input_fn is None:
        raise ConfigError(f"mode={settings.mode.name} with exports needs serving_input_fn, the dotted name of a "
                          "function that returns a tpuspec.ServingInputReceiver; the config sets none.")
    check_name(settings.export.name, "export.name")
    if len(set(settings.export.exporters)) != len(settings.export.exporters):
        raise ConfigError("export.exporters names one kind twice; got "
                          f"{[kind.name for kind in settings.export.exporters]}.")
