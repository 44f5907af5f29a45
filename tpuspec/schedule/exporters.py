"""Exporters: which of the evaluated checkpoints are exported, and how many exports stay."""

from __future__ import annotations

import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from tpuspec.errors import ConfigError, ConfigTypeError, ExportError
from tpuspec.export.bundle import Metadata, check_asset_places
from tpuspec.export.receiver import check_serving_input_fn
from tpuspec.loops.export_folder import exports_in, keep_newest
from tpuspec.spec.counts import check_int
from tpuspec.spec.functions import argument_names
from tpuspec.spec.names import check_name
from tpuspec.spec.results import EvalResult

logger = logging.getLogger(__name__)

_COMPARE_ARGUMENTS = ("best_eval_result", "current_eval_result")


class Exports(Protocol):
    """What an exporter needs of a Trainer."""

    def export(self, export_dir_base: str | os.PathLike[str], serving_input_fn: Callable[..., Any],
               checkpoint_path: str | os.PathLike[str] | None = None, *,
               assets_extra: Mapping[str, Any] | None = None, metrics: EvalResult | None = None) -> str:
        """See `Trainer.export`."""
        ...


class Exporter(ABC):
    """Decides behind each evaluation whether its checkpoint is exported; called on the chief only.

    Source: tf.estimator.Exporter.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Its exports lie in model_dir/export/<name>."""

    @abstractmethod
    def export(self, trainer: Exports, export_path: str, checkpoint_path: str, eval_result: EvalResult,
               is_the_final_export: bool) -> str | None:
        """Exports, or not.

        Args:
          trainer: has the model.
          export_path: the folder for its exports.
          checkpoint_path: what was evaluated.
          eval_result: of the evaluation.
          is_the_final_export: whether training is complete.

        Returns:
          The folder of the export, or None without one.
        """


class LatestExporter(Exporter):
    """Exports every evaluated checkpoint, and keeps the newest exports.

    Args:
      name: of its folder.
      serving_input_fn: as `Trainer.export` takes it.
      assets_extra: likewise.
      exports_to_keep: how many; None keeps all.

    Raises:
      ConfigError, ConfigTypeError: the name is none of a folder, serving_input_fn no such function, assets_extra names
        something else than files by their places, or exports_to_keep is no whole number above zero.
    """

    def __init__(self, name: str, serving_input_fn: Callable[..., Any], *,
                 assets_extra: Mapping[str, Any] | None = None, exports_to_keep: int | None = 5) -> None:
        self._name = check_exporter_name(name)
        self._serving_input_fn = check_serving_input_fn(serving_input_fn)
        self._assets_extra = check_asset_places(assets_extra)
        if exports_to_keep is not None:
            check_int("exports_to_keep", exports_to_keep)
            if exports_to_keep <= 0:
                raise ConfigError(f"exports_to_keep must be a positive number, or None, which keeps all; got "
                                  f"{exports_to_keep}.")
        self._exports_to_keep = exports_to_keep

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self._name

    def export(self, trainer: Exports, export_path: str, checkpoint_path: str, eval_result: EvalResult,
               is_the_final_export: bool) -> str | None:
        """Exports, and deletes the oldest exports above the number to keep."""
        path = trainer.export(export_path, self._serving_input_fn, checkpoint_path, assets_extra=self._assets_extra,
                              metrics=eval_result)
        if self._exports_to_keep is not None:
            try:
                keep_newest(Path(export_path), self._exports_to_keep)
            except OSError as error:  # the export is there; the next one tries again
                logger.warning("an old export in %s could not be deleted: %s", export_path, error)
        return path


class FinalExporter(LatestExporter):
    """Exports once training is complete."""

    def __init__(self, name: str, serving_input_fn: Callable[..., Any], *,
                 assets_extra: Mapping[str, Any] | None = None) -> None:
        super().__init__(name, serving_input_fn, assets_extra=assets_extra, exports_to_keep=None)

    def export(self, trainer: Exports, export_path: str, checkpoint_path: str, eval_result: EvalResult,
               is_the_final_export: bool) -> str | None:
        """Exports if it is the final one."""
        if not is_the_final_export:
            return None
        return super().export(trainer, export_path, checkpoint_path, eval_result, is_the_final_export)


def loss_is_smaller(best_eval_result: EvalResult, current_eval_result: EvalResult) -> bool:
    """Whether the loss is smaller than the best so far; a number is better than NaN.

    Raises:
      ConfigError: there is no loss.
    """
    return _is_better("loss", best_eval_result, current_eval_result, higher_is_better=False)


def compare_metric(metric: str, *, higher_is_better: bool) -> Callable[[EvalResult, EvalResult], bool]:
    """Returns a comparison for `BestExporter` by one metric of an evaluation."""
    def is_better(best_eval_result: EvalResult, current_eval_result: EvalResult) -> bool:
        return _is_better(metric, best_eval_result, current_eval_result, higher_is_better=higher_is_better)

    return is_better


def _is_better(metric: str, best: EvalResult, current: EvalResult, *, higher_is_better: bool) -> bool:
    for result in (best, current):
        if metric not in result:
            raise ConfigError(f"exports are compared by {metric!r}, which the evaluation does not give; it gives "
                              f"{sorted(result)}.")
    if math.isnan(best[metric]) or math.isnan(current[metric]):
        return not math.isnan(current[metric])
    return current[metric] > best[metric] if higher_is_better else current[metric] < best[metric]


class BestExporter(LatestExporter):
    """Exports a checkpoint that evaluates better than all before; the newest export is the best one.

    The best result is kept in the export itself, so that a later run goes on from there; where there is no export, the
    first result is the best.

    Args:
      name: of its folder.
      serving_input_fn: as `Trainer.export` takes it.
      compare_fn: function (best_eval_result, current_eval_result) that says whether the current one is better.
      assets_extra: as `Trainer.export` takes them.
      exports_to_keep: how many; None keeps all.

    Raises:
      ConfigError, ConfigTypeError: as LatestExporter, or compare_fn takes other arguments.
    """

    def __init__(self, name: str = "best_exporter", serving_input_fn: Callable[..., Any] | None = None, *,
                 compare_fn: Callable[[EvalResult, EvalResult], bool] = loss_is_smaller,
                 assets_extra: Mapping[str, Any] | None = None, exports_to_keep: int | None = 5) -> None:
        super().__init__(name, serving_input_fn,  # type: ignore[arg-type] - None is refused there
                         assets_extra=assets_extra, exports_to_keep=exports_to_keep)
        if not callable(compare_fn):
            raise ConfigTypeError(f"compare_fn must be a function of {' and '.join(_COMPARE_ARGUMENTS)}; got "
                                  f"{type(compare_fn).__name__}.")
        missing = [argument for argument in _COMPARE_ARGUMENTS if argument not in argument_names(compare_fn)]
        if missing:
            raise ConfigError(f"compare_fn must take {' and '.join(_COMPARE_ARGUMENTS)}; it lacks {missing}.")
        self._compare: Callable[..., bool] = compare_fn

    def export(self, trainer: Exports, export_path: str, checkpoint_path: str, eval_result: EvalResult,
               is_the_final_export: bool) -> str | None:
        """Exports if the result is better than that of the newest export."""
        best = _newest_metrics(Path(export_path))
        if best is not None and not self._compare(best_eval_result=best, current_eval_result=eval_result):
            return None
        return super().export(trainer, export_path, checkpoint_path, eval_result, is_the_final_export)


def _newest_metrics(export_path: Path) -> EvalResult | None:
    for folder in reversed(exports_in(export_path)):
        try:
            if metrics := Metadata.read(folder).metrics:
                return dict(metrics)
        except ExportError as error:
            logger.warning("an export is passed over: %s", error)
    return None


def check_exporter_name(name: Any) -> str:
    """Returns the name of an exporter.

    Raises:
      ConfigError, ConfigTypeError: it is none of a folder.
    """
    if name is None or name == "":
        raise ConfigError("An Exporter must have a name; it names the folder of its exports.")
    return check_name(name, "the name of an Exporter")


def check_exporters(exporters: Any) -> tuple[Exporter, ...]:
    """Returns the exporters of an EvalSpec as a tuple.

    Raises:
      ConfigTypeError: something is no Exporter.
      ConfigError: a name is missing, or two have the same.
    """
    found: tuple[Any, ...] = () if exporters is None else (exporters,)
    if isinstance(exporters, Iterable):
        found = tuple(exporters)
    if not all(isinstance(exporter, Exporter) for exporter in found):
        raise ConfigTypeError("`exporters` must be an Exporter, an iterable of Exporter, or `None`; got "
                              f"{exporters!r}.")
    names = []
    for exporter in found:
        name = exporter.name
        if not isinstance(name, str):
            raise ConfigError(f"An Exporter must have a name that is a str; got {name!r} of {exporter!r}.")
        if check_exporter_name(name) in names:
            raise ConfigError(f"Exporters must have names of their own; two are called {name!r}.")
        names.append(name)
    return found
