"""The running values of one evaluation: metrics by name, updated step by step, computed at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat, dim_zero_max, dim_zero_min, dim_zero_sum

from tpuspec.errors import SpecError, SpecTypeError
from tpuspec.precision import for_host
from tpuspec.spec.estimator_spec import check_metric_value

# Reductions of a metric's states that are exact whatever the number of updates behind each.
_MERGEABLE = (dim_zero_sum, dim_zero_cat, dim_zero_max, dim_zero_min)

_Stateful = Metric | MetricCollection

RESERVED_NAMES = ("loss", "global_step")


def check_metric_names(results: object) -> None:
    """Checks what metric_fn returned: a dict of allowed names and kinds of value.

    Raises:
      SpecTypeError: no dict, or a value of another kind.
      SpecError: a reserved name, or a Metric that was never updated.
    """
    if not isinstance(results, Mapping):
        raise SpecTypeError(f"metric_fn must return a dict of name -> metric; got {type(results).__name__}.")
    for name, value in results.items():
        if not isinstance(name, str):
            raise SpecTypeError(f"metric_fn must return names that are str; got {name!r}.")
        if name in RESERVED_NAMES:
            raise SpecError(f"Metric with name `{name}` is not allowed, because Estimator already defines a default "
                            "metric with the same name. Rename it.")
        check_metric_value(name, value)


class MetricState:
    """Folds what metric_fn returns for each step into one value per name; see `TPUEstimatorSpec.eval_metrics`."""

    def __init__(self) -> None:
        self._values: dict[str, _Mean | _Stateful] = {}
        self._owned: dict[str, _Stateful] = {}

    def update(self, results: Mapping[str, Any], num_rows: int) -> None:
        """Adds one step.

        Args:
          results: name -> (metric, arguments or None), metric, or number or tensor to be averaged over rows; a metric
            is a torchmetrics.Metric or a MetricCollection, whose value is a dict.
          num_rows: real rows of the step.

        Raises:
          SpecError, SpecTypeError: a name or a value breaks a rule, or changed its kind.
        """
        check_metric_names(results)
        for name in sorted(results):
            metric, arguments = _split(results[name])
            if isinstance(metric, _Stateful):
                self._update_metric(name, metric, arguments)
            else:
                mean = self._values.setdefault(name, _Mean())
                if not isinstance(mean, _Mean):
                    raise SpecTypeError(f"metric {name!r} was a Metric in an earlier step; got "
                                        f"{type(metric).__name__}.")
                mean.add(name, metric, num_rows)

    def _update_metric(self, name: str, metric: _Stateful, arguments: tuple[Any, ...] | None) -> None:
        kept = self._values.get(name)
        if isinstance(kept, _Mean) or (kept is not None and type(kept) is not type(metric)):
            raise SpecTypeError(f"metric {name!r} changed its kind from step to step; got {type(metric).__name__}.")
        if arguments is None:
            if kept is not None and kept is not metric:
                _merge(name, kept, metric)
            self._values[name] = self._owned[name] = metric
            return
        if kept is None:
            metric.reset()  # may be the user's, left over from an evaluation before
            self._values[name] = kept = metric
        kept.update(*arguments)

    def compute(self) -> dict[str, Any]:
        """Returns name -> int, float or array, nesting kept, in the order of names."""
        for value in self._values.values():
            if isinstance(value, Metric):
                # Of the chief alone, which has all rows: nothing is to be brought together.
                value.distributed_available_fn = _nobody
        return {name: to_plain(self._values[name].compute()) for name in sorted(self._values)}

    def reset_owned(self) -> None:
        """Resets the metrics that metric_fn updates by itself, so that the next evaluation starts afresh."""
        for metric in self._owned.values():
            metric.reset()
        self._owned.clear()


def _merge(name: str, earlier: _Stateful, newest: _Stateful) -> None:
    """Adds the state of the steps before to the newest step's metric; rows stay in the order of steps."""
    if not isinstance(newest, Metric) or not isinstance(earlier, Metric) or newest.full_state_update is not False or (
            newest.dist_sync_on_step or any(r not in _MERGEABLE for r in newest._reductions.values())):
        raise SpecTypeError(
            f"metric {name!r}, a {type(newest).__name__}, cannot be merged over steps exactly, and metric_fn made a "
            "new one for each. Return (metric, arguments of its update), or keep one metric and update it.")
    newest.merge_state(earlier)
    newest._computed = None  # merge_state leaves a value that metric_fn computed


def _nobody() -> bool:
    return False


def _split(value: Any) -> tuple[Any, tuple[Any, ...] | None]:
    return value if isinstance(value, tuple) else (value, None)


class _Mean:
    """Mean over rows of numbers, of scalars, or of tensors [rows, ...]."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._num_rows = 0

    def add(self, name: str, value: Tensor | float, num_rows: int) -> None:
        tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value)
        wide = torch.complex128 if tensor.is_complex() else torch.float64
        if tensor.ndim == 0:
            total = tensor.to("cpu", wide) * num_rows
        elif tensor.shape[0] == num_rows:
            total = tensor.sum(0, dtype=wide).cpu()
        else:
            raise SpecTypeError(
                f"metric {name!r} must be a number, or a tensor with one value per row, [{num_rows}, ...], which is "
                f"averaged; got shape {list(tensor.shape)}. Return (metric, arguments) for other values.")
        self._total = total if self._total is None else self._total + total
        self._num_rows += num_rows

    def compute(self) -> Tensor:
        assert self._total is not None
        return self._total / max(self._num_rows, 1)


def to_plain(value: Any) -> Any:
    """Turns tensors into Python numbers (rank 0) or numpy arrays; keeps dicts, tuples and lists."""
    if isinstance(value, Tensor):
        return value.item() if value.ndim == 0 else for_host(value.detach().cpu()).numpy()
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if hasattr(value, "_fields"):
        return type(value)(*(to_plain(item) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(to_plain(item) for item in value)
    return value
