"""Scaffold: the pieces of set-up that a model_fn may bring, run on the host once per call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from tpuspec.errors import SpecError, SpecTypeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaffold:
    """What scaffold_fn returns; every part is optional.

    Attributes:
      init_fn: called with the module after it was built and no checkpoint was restored, train only.
      restore: called with (module, checkpoint state dict) in place of loading the state dict into the module.
      saver: called with the module; returns the state dict to save in place of `module.state_dict()`.
      ready_fn: called with the module before the first step; returns None when ready, else what is missing.
    """

    init_fn: Callable[[nn.Module], None] | None = None
    restore: Callable[[nn.Module, dict[str, Tensor]], None] | None = None
    saver: Callable[[nn.Module], dict[str, Tensor]] | None = None
    ready_fn: Callable[[nn.Module], str | None] | None = None


def make_scaffold(scaffold_fn: Callable[[], Scaffold] | None) -> Scaffold:
    """Calls scaffold_fn, or returns an empty Scaffold where there is none.

    Raises:
      SpecError: scaffold_fn holds a tensor of model_fn in its closure, or returns None.
      SpecTypeError: scaffold_fn returns something else than a Scaffold.
    """
    if scaffold_fn is None:
        return Scaffold()
    check_no_captured_tensor(scaffold_fn)
    scaffold = scaffold_fn()
    if scaffold is None:
        raise SpecError("TPUEstimatorSpec.scaffold_fn returns None, which is not allowed; return a Scaffold.")
    if not isinstance(scaffold, Scaffold):
        raise SpecTypeError(f"scaffold_fn must return a Scaffold; got {type(scaffold).__name__}.")
    return scaffold


def check_no_captured_tensor(scaffold_fn: Callable[[], Scaffold]) -> None:
    """Refuses a scaffold_fn whose closure holds a tensor: it runs on the host, apart from the step.

    Raises:
      SpecError: names the captured variable.
    """
    while isinstance(scaffold_fn, functools.partial):
        scaffold_fn = scaffold_fn.func
    code, closure = getattr(scaffold_fn, "__code__", None), getattr(scaffold_fn, "__closure__", None)
    for name, cell in zip(code.co_freevars, closure, strict=True) if code and closure else ():
        try:
            value = cell.cell_contents
        except ValueError:
            continue
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            raise SpecError(
                f"Inside scaffold_fn: {name!r} depends on TPU computation; scaffold_fn runs on the host and must not "
                "capture a Tensor of model_fn. Take what it needs from the module it is given.")
