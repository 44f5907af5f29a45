"""The default writer: what `tpuspec.summary.scalar` and its kin write to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from tpuspec.errors import ConfigError, ConfigTypeError
from tpuspec.summary.values import step_value
from tpuspec.summary.writer import SummaryWriter

_default: ContextVar[tuple[SummaryWriter, int | None] | None] = ContextVar("tpuspec_summary_default", default=None)


@contextlib.contextmanager
def as_default(writer: SummaryWriter, step: Any = None) -> Iterator[SummaryWriter]:
    """Makes `writer` the one that scalar, histogram, image and text write to within the block, in this thread.

    Args:
      writer: a SummaryWriter; the block does not close it.
      step: step of the calls that name none; an int, or an integer tensor of one element.

    Raises:
      ConfigTypeError: `writer` is none, or `step` is no integer.
    """
    if not callable(getattr(writer, "scalar", None)):
        raise ConfigTypeError(f"as_default takes a SummaryWriter; got {type(writer).__name__}. "
                              "Make one by tpuspec.summary.create_file_writer(logdir).")
    token = _default.set((writer, None if step is None else step_value(step)))
    try:
        yield writer
    finally:
        _default.reset(token)


def scalar(name: str, value: Any, step: Any = None) -> None:
    """Writes one number to the default writer.

    Args:
      name: the summary's name; a slash makes groups, such as 'train/accuracy'.
      value: a number, or a tensor or array of one element.
      step: None takes the step of the host_call, or of as_default.

    Raises:
      ConfigError: outside host_call and as_default, without a step, or `value` is not one number.
      ConfigTypeError: `name`, `value` or `step` has the wrong type.

    Source: tf.summary.scalar.
    """
    writer, step = _destination("scalar", step)
    writer.scalar(name, value, step)


def histogram(name: str, values: Any, step: Any = None) -> None:
    """Writes the distribution of numbers of any shape to the default writer; see scalar."""
    writer, step = _destination("histogram", step)
    writer.histogram(name, values, step)


def image(name: str, image: Any, step: Any = None) -> None:
    """Writes [H, W], [C, H, W] or a grid of [N, C, H, W], float in 0..1 or uint8, to the default writer; see scalar."""
    writer, step = _destination("image", step)
    writer.image(name, image, step)


def text(name: str, text: str, step: Any = None) -> None:
    """Writes a text to the default writer; see scalar."""
    writer, step = _destination("text", step)
    writer.text(name, text, step)


def _destination(function: str, step: Any) -> tuple[SummaryWriter, int]:
    default = _default.get()
    if default is None:
        raise ConfigError(
            f"tpuspec.summary.{function} works inside host_call, or within tpuspec.summary.as_default(writer, step); "
            "got a call outside both. Move it into host_call: model_fn is traced and does not run on every step.")
    writer, default_step = default
    if step is not None:
        return writer, step_value(step)
    if default_step is None:
        raise ConfigError(f"tpuspec.summary.{function} needs a step; got none. Pass step=..., or give as_default one.")
    return writer, default_step
