"""Every error that tpuspec raises is one of this tree, each also a builtin, so that plain `except ValueError` works.

TpuspecError
├── ConfigError (ValueError)         a setting or argument: exit code 2
├── ConfigTypeError (TypeError)      the same, of a wrong type
├── SpecError (ValueError)           what model_fn returned
├── SpecTypeError (TypeError)        the same, of a wrong type
├── SpecUsageError (RuntimeError)    the same, where the parts do not fit each other
├── InputError (ValueError)          what input_fn returned or yielded
├── InputTypeError (TypeError)       the same, of a wrong type
├── HostCallError (RuntimeError)     user code on the host (metric_fn, host_call) raised
├── CaptureError (RuntimeError)      a step cannot be captured and replayed, or is not what was captured
├── DeviceError (RuntimeError)       no device, no torch_xla, or a client already started otherwise
├── OperationError (NotImplementedError)  an operation that XLA does not have, or not as torch has it
├── NonFiniteLossError (ArithmeticError)  the loss is NaN or infinite
├── HangError (TimeoutError)         nothing moves any more: exit code 4
├── HostFailureError (RuntimeError)  another host of the run failed, or cannot be reached
├── ExportError (RuntimeError)       a model cannot be exported, or an export not be loaded
└── CheckpointError (RuntimeError)   a checkpoint cannot be written or read: exit code 3

Subclasses that only one part raises, such as DamagedCheckpointError, stand where they are raised.
Messages say the rule, what was got and how to mend it.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import ClassVar


class TpuspecError(Exception):
    """Base of every error that tpuspec raises on purpose."""


class ConfigError(TpuspecError, ValueError):
    """A setting or an argument breaks a rule."""


class ConfigTypeError(TpuspecError, TypeError):
    """A setting or an argument has the wrong type."""


class SpecError(TpuspecError, ValueError):
    """What model_fn returned breaks a rule of the spec."""


class SpecTypeError(TpuspecError, TypeError):
    """A field of the spec has the wrong type."""


class SpecUsageError(TpuspecError, RuntimeError):
    """A field of the spec cannot work as it is (arity, scalars, kind of spec)."""


class InputError(TpuspecError, ValueError):
    """What input_fn returned or yielded breaks a rule."""


class InputTypeError(TpuspecError, TypeError):
    """What input_fn returned or yielded has the wrong type."""


class HostCallError(TpuspecError, RuntimeError):
    """User code that runs on the host for each step raised; the user's own error is the cause."""


class CaptureError(TpuspecError, RuntimeError):
    """A step cannot be captured although that is required, or a replayed step is no longer what model_fn computes."""


class DeviceError(TpuspecError, RuntimeError):
    """The XLA device, its runtime, or its settings are not usable."""


class OperationError(TpuspecError, NotImplementedError):
    """An operation, or a form of it, that XLA does not have, or computes otherwise than torch."""


class NonFiniteLossError(TpuspecError, ArithmeticError):
    """The loss of a training step is NaN or infinite."""


class HangError(TpuspecError, TimeoutError):
    """Something takes longer than the settings allow; `exit_code` is the one of a process that ends by it."""

    exit_code: ClassVar[int] = 4


class HostFailureError(TpuspecError, RuntimeError):
    """Another host of the run failed, so this one cannot go on; names the first that failed, where, and its error."""


class ExportError(TpuspecError, RuntimeError):
    """A model cannot be exported, or an export cannot be loaded or served."""


class CheckpointError(TpuspecError, RuntimeError):
    """A checkpoint cannot be written, or what is stored cannot be used."""


@contextlib.contextmanager
def as_os_errors() -> Iterator[None]:
    """Turns the exceptions of a file system's own client into OSError, of which callers know."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error
