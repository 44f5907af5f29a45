"""The user's functions: what they may take, and how their arguments are matched by name."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tpuspec.errors import ConfigError, ConfigTypeError
from tpuspec.spec.estimator_spec import EstimatorSpec, TPUEstimatorSpec

MODEL_FN_ARGUMENTS = ("features", "labels", "mode", "params", "config", "model", "optimizer", "global_step")
INPUT_FN_ARGUMENTS = ("params", "mode", "config", "input_context")


ModelFn = Callable[..., TPUEstimatorSpec | EstimatorSpec]
"""Builds one step; called with the arguments it names out of MODEL_FN_ARGUMENTS, by keyword. It returns the spec.

It is traced: a step that was compiled is replayed without calling it, so side effects belong in `host_call`. It is
also called once before the first step of a mode, on the first batch, to check the spec before anything is compiled;
what that call changes (buffers, random state) is put back.

Arguments it may name:
  features: as input_fn yields them, this replica's rows: [batch, ...] tensors on the device.
  labels: likewise, or None; always None in PREDICT.
  mode: a ModeKeys value.
  params: a copy of the Trainer's, plus 'batch_size', 'use_tpu' and on XLA 'context'.
  config: a copy of the RunConfig.
  model: the module, on the device, in train() or eval() mode.
  optimizer: what the Trainer's optimizer function returned; None outside TRAIN.
  global_step: int64 [1] on the device, the value before this step.
"""

InputFn = Callable[..., Any]
"""Makes the input: a Dataset, a DataLoader, or an iterable of batches. Called with the arguments it names, by keyword.

Arguments it may name (`params` it must):
  params: a copy of the Trainer's, plus 'batch_size' and on XLA 'context'.
  mode: a ModeKeys value.
  config: a copy of the RunConfig.
  input_context: the deployment of this call.
"""

ModelFactory = Callable[[Mapping[str, Any]], nn.Module]
OptimizerFactory = Callable[[nn.Module | None, Mapping[str, Any]], Optimizer | dict[str, Optimizer]]
SchedulerFactory = Callable[[Any, Mapping[str, Any]], LRScheduler | dict[str, LRScheduler]]


def argument_names(fn: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the parameters that can be matched: plain and keyword-only ones, less `self` and those a partial bound.

    Raises:
      ConfigTypeError: `fn` is not callable or has no signature.
    """
    if not callable(fn):
        raise ConfigTypeError(f"expected a function; got {type(fn).__name__}.")
    bound = set(fn.keywords) if isinstance(fn, functools.partial) else set()
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError) as error:
        raise ConfigTypeError(f"cannot read the arguments of {describe(fn)}: {error}.") from error
    return tuple(p.name for p in parameters
                 if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in bound)


def describe(fn: Callable[..., Any]) -> str:
    """A function's name for messages."""
    if isinstance(fn, functools.partial):
        return f"partial of {describe(fn.func)}"
    return getattr(fn, "__qualname__", None) or type(fn).__qualname__


def call_by_name(fn: Callable[..., Any], available: Mapping[str, Any]) -> Any:
    """Calls `fn` with those of the available arguments that it names."""
    return fn(**{name: available[name] for name in argument_names(fn) if name in available})


def check_model_fn(model_fn: Callable[..., Any], *, params_given: bool) -> None:
    """Checks model_fn's arguments at construction of the Trainer.

    Raises:
      ConfigError: an argument is unknown, `features` is missing, or `params` is missing though params were given.
      ConfigTypeError: model_fn is not callable.
    """
    if not callable(model_fn):
        raise ConfigTypeError(f"model_fn must be a function; got {type(model_fn).__name__}.")
    names = argument_names(model_fn)
    if "features" not in names:
        raise ConfigError(f"model_fn ({describe(model_fn)}) must include features argument.")
    if params_given and "params" not in names:
        raise ConfigError(
            f"model_fn ({describe(model_fn)}) does not include params argument, but params are passed to the Trainer.")
    unexpected = [name for name in names if name not in MODEL_FN_ARGUMENTS]
    if unexpected:
        near = difflib.get_close_matches(unexpected[0], MODEL_FN_ARGUMENTS, n=1)
        raise ConfigError(
            f"model_fn ({describe(model_fn)}) has following not expected args: {unexpected}. It may take "
            f"{', '.join(MODEL_FN_ARGUMENTS)}." + (f" Did you mean {near[0]!r}?" if near else ""))


def check_model_fn_call(model_fn: Callable[..., Any], *, has_labels: bool) -> None:
    """Checks model_fn's arguments against the input, before it is called.

    Raises:
      ConfigError: labels would be dropped, or `params` (which carries the batch size) is not taken.
    """
    names = argument_names(model_fn)
    if has_labels and "labels" not in names:
        raise ConfigError(
            f"model_fn ({describe(model_fn)}) does not take labels, but input_fn returns labels. Add a labels "
            "argument, or yield features only.")
    if "params" not in names:
        raise ConfigError(
            f"model_fn ({describe(model_fn)}) does not include params argument, required by TPUEstimator to pass batch "
            "size as params['batch_size'].")


def check_input_fn(input_fn: Callable[..., Any]) -> None:
    """Checks input_fn's arguments before it is called.

    Raises:
      ConfigTypeError: not callable.
      ConfigError: `params` is missing, or an argument is unknown and has no default.
    """
    if not callable(input_fn):
        raise ConfigTypeError(f"input_fn must be a function that returns the input; got {type(input_fn).__name__}.")
    names = argument_names(input_fn)
    if "params" not in names:
        raise ConfigError(
            f"input_fn ({describe(input_fn)}) does not include params argument, required by TPUEstimator to pass batch "
            "size as params[\"batch_size\"].")
    unexpected = [name for name in names if name not in INPUT_FN_ARGUMENTS and name not in _with_defaults(input_fn)]
    if unexpected:
        raise ConfigError(
            f"input_fn ({describe(input_fn)}) has following not expected args: {unexpected}. It may take "
            f"{', '.join(INPUT_FN_ARGUMENTS)}.")


def _with_defaults(fn: Callable[..., Any]) -> set[str]:
    return {name for name, p in inspect.signature(fn).parameters.items() if p.default is not p.empty}


def is_user_frame(frame: FrameType) -> bool:
    """Whether a frame is neither torch's nor tpuspec's."""
    module = frame.f_globals.get("__name__", "")
    return not module.startswith(("torch.", "tpuspec.", "torch_xla.", "contextlib"))


def user_place(frame: FrameType | None) -> str:
    """Returns FILE:LINE of the innermost caller that is neither torch's nor tpuspec's."""
    while frame is not None and not is_user_frame(frame):
        frame = frame.f_back
    return "a place in torch" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
