"""What users hand to a summary, as Python numbers and numpy arrays; each refusal names the summary."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
from torch import Tensor

from tpuspec.errors import ConfigError, ConfigTypeError

CHANNELS = (1, 3, 4)


def scalar_value(name: str, value: Any) -> float:
    """Returns the one number that `value` holds.

    Raises:
      ConfigTypeError: `name` is no string, or `value` is no number, tensor or array of real numbers.
      ConfigError: `value` holds none, or more than one.
    """
    check_tag(name)
    if isinstance(value, numbers.Real):
        return float(value)
    if not isinstance(value, Tensor | np.ndarray | np.generic):
        raise ConfigTypeError(
            f"summary scalar {name!r} takes a number, or a tensor or array of one element; got {type(value).__name__}.")
    if (value.numel() if isinstance(value, Tensor) else value.size) != 1:
        raise ConfigError(
            f"summary scalar {name!r} takes one number; got shape {list(value.shape)}. Reduce it first, such as by "
            "value.mean(), or write a histogram.")
    return float(array_value(name, value).reshape(()))


def step_value(step: Any) -> int:
    """Returns `step` as an int; an integer tensor or array of one element counts as one.

    Raises:
      ConfigTypeError: `step` is no integer.
      ConfigError: a tensor or array of more or fewer elements, such as a global_step of several replicas.
    """
    if type(step) is int:
        return step
    if isinstance(step, Tensor | np.ndarray):
        array = array_value("step", step)
        if array.dtype.kind in "iu":
            if array.size != 1:
                raise ConfigError(f"a summary's step is one integer; got shape {list(array.shape)}. Take its first "
                                  "element: global_step[0].")
            return int(array.reshape(()))
    elif isinstance(step, numbers.Integral) and not isinstance(step, bool):
        return int(step)
    raise ConfigTypeError(f"a summary's step must be an integer; got {step!r}.")


def array_value(name: str, values: Any) -> np.ndarray:
    """Returns numbers of any shape as an array of bool, int or float.

    Raises:
      ConfigTypeError: `name` is no string, or `values` holds something else than real numbers.
    """
    check_tag(name)
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        # numpy has no bfloat16 and no float8.
        values = (values.float() if values.is_floating_point() and values.itemsize < 4 else values).numpy()
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ConfigTypeError(f"summary {name!r} takes a tensor, an array or numbers; got {type(values).__name__}: "
                              f"{error}.") from error
    if array.dtype.kind not in "biuf":
        raise ConfigTypeError(f"summary {name!r} takes real numbers; got {type(values).__name__} of {array.dtype}.")
    return array


def image_value(name: str, image: Any) -> np.ndarray:
    """Returns an image as uint8, of the shape that it has.

    Args:
      name: the summary's name.
      image: [H, W], [C, H, W] or [N, C, H, W], where C is 1, 3 or 4 (for one image); float in 0..1, uint8 or bool.
        What lies outside 0..1 is clipped, NaN is black.

    Raises:
      ConfigTypeError: of another dtype.
      ConfigError: of another shape, or empty.
    """
    array = array_value(name, image)
    if array.dtype != np.uint8 and array.dtype.kind not in "bf":
        raise ConfigTypeError(f"summary image {name!r} must be float in 0..1, or uint8; got {array.dtype}.")
    # torch draws a grid from 1 or 3 channels only.
    channels = CHANNELS if array.ndim < 4 else CHANNELS[:2]
    if array.ndim not in (2, 3, 4) or 0 in array.shape or (array.ndim > 2 and array.shape[-3] not in channels):
        raise ConfigError(
            f"summary image {name!r} must be [H, W], [C, H, W] or [N, C, H, W] with C of 1, 3 or, for one image, 4; "
            f"got shape {list(array.shape)}.")
    if array.dtype == np.uint8:
        return array
    return (np.nan_to_num(array.astype(np.float32), nan=0.0).clip(0, 1) * 255).astype(np.uint8)


def text_value(name: str, text: Any) -> str:
    """Returns `text`.

    Raises:
      ConfigTypeError: `name` or `text` is no string.
    """
    check_tag(name)
    if not isinstance(text, str):
        raise ConfigTypeError(f"summary text {name!r} takes a str; got {type(text).__name__}.")
    return text


def check_tag(name: Any) -> None:
    """Checks a summary's name.

    Raises:
      ConfigTypeError: it is no string.
      ConfigError: it is empty.
    """
    if not isinstance(name, str):
        raise ConfigTypeError(f"a summary's name must be a str; got {name!r}.")
    if not name:
        raise ConfigError("a summary's name must be non-empty; got ''.")
