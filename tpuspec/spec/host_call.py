"""A function that runs on the host, with the device tensors it is given each step: eval_metrics and host_call."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from tpuspec.errors import SpecError, SpecTypeError, SpecUsageError
from tpuspec.precision import for_host

logger = logging.getLogger(__name__)

HostTensors = Sequence[Any] | Mapping[str, Any]
"""Tensors of a host function: a list is passed by position, a dict by keyword."""


class HostCall(NamedTuple):
    """A host function and its tensors; any 2-tuple of that form is accepted in its place.

    Attributes:
      fn: called on the host CPU.
      tensors: list -> positional arguments, dict -> keyword arguments; each [batch, ...] or at least [1].
    """

    fn: Callable[..., Any]
    tensors: Any


def check_host_call(name: str, host_call: object) -> None:
    """Checks the structure of `eval_metrics` or `host_call`; None means absent.

    Raises:
      SpecError: no 2-tuple, or the tensors are neither a list nor a dict.
      SpecTypeError: the function is not callable.
      SpecUsageError: a list of tensors does not fit the function's positional parameters.

    Source: _OutfeedHostCall.validate of TPUEstimator.
    """
    if host_call is None:
        return
    if not isinstance(host_call, tuple | list):
        raise SpecError(
            f"{name} should be tuple or list, (function, tensors); got {type(host_call).__name__}.")
    if len(host_call) != 2:
        raise SpecError(f"{name} should have two elements, (function, tensors); got {len(host_call)}.")
    fn, tensors = host_call
    if not callable(fn):
        raise SpecTypeError(f"{name}[0] should be callable; got {type(fn).__name__}.")
    if not isinstance(tensors, tuple | list | dict):
        raise SpecError(
            f"{name}[1] should be tuple or list, or dict; got {type(tensors).__name__}. Put a single tensor in a list.")
    if isinstance(tensors, dict):
        return
    num_parameters = _num_positional_parameters(fn)
    if num_parameters is not None and num_parameters != len(tensors):
        raise SpecUsageError(
            f"In TPUEstimatorSpec.{name}, length of tensors {len(tensors)} does not match method args of the function, "
            f"which takes {num_parameters}.")


def _num_positional_parameters(fn: Callable[..., Any]) -> int | None:
    """Counts the parameters that can be passed by position; None where that cannot be told (`*args`, builtins)."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def named_tensors(tensors: HostTensors) -> list[tuple[str, Any]]:
    """Returns (name, tensor) pairs in order; positions are the names of a list's tensors."""
    if isinstance(tensors, Mapping):
        return list(tensors.items())
    return [(str(i), t) for i, t in enumerate(tensors)]


def check_host_tensors(name: str, tensors: HostTensors, *, batch_size: int | None) -> None:
    """Checks that each tensor can be concatenated over replicas along axis 0.

    Args:
      name: `eval_metrics` or `host_call`.
      tensors: the tensors of one replica.
      batch_size: rows that each must have, or None where any rank >= 1 will do.

    Raises:
      SpecTypeError: a value is no tensor.
      SpecUsageError: a tensor is a scalar, or not batch-major where it must be.
    """
    for key, tensor in named_tensors(tensors):
        if not isinstance(tensor, Tensor):
            raise SpecTypeError(f"{name} tensor {key!r} must be a Tensor; got {type(tensor).__name__}.")
        if tensor.ndim == 0:
            raise SpecUsageError(
                f"All tensors of {name} should preserve batch size dimension, but got scalar {key!r}. "
                f"Reshape it to [1]: tensor.reshape(1).")
        if batch_size is not None and tensor.shape[0] != batch_size:
            raise SpecUsageError(
                f"{name} tensor {key!r} must be batch-major, [{batch_size}, ...]; got shape {list(tensor.shape)}.")


def _for_host(value: Any) -> Any:
    return for_host(value.detach()) if isinstance(value, Tensor) else value


def check_keywords(name: str, fn: Callable[..., Any], tensors: HostTensors) -> None:
    """Checks that `fn` can be called with the dict of `tensors`, without calling it.

    Raises:
      SpecTypeError: the keys are not its parameters.
    """
    if not isinstance(tensors, Mapping):
        return
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(**tensors)
    except TypeError as error:
        raise SpecTypeError(f"the tensors of {name}, {sorted(tensors)}, do not match the parameters of its function: "
                            f"{error}.") from error


def call_host_function(name: str, fn: Callable[..., Any], tensors: HostTensors) -> Any:
    """Calls `fn` with tensors by position (list) or by keyword (dict), and returns what it returns.

    Tensors come without their autograd history; those of a dtype that numpy does not have, as bfloat16, as float32.

    Raises:
      TypeError: the function's own, unchanged, after a warning that names the call: the keys of a dict may not be the
        function's parameters.
    """
    if not isinstance(tensors, Mapping):
        return fn(*map(_for_host, tensors))
    try:
        return fn(**{key: _for_host(tensor) for key, tensor in tensors.items()})
    except TypeError as error:
        logger.warning("Exception while calling %s: %s. It is likely that the tensors %s do not match the function's "
                       "parameters.", name, error, sorted(tensors))
        raise
