"""Parts of torch as torch has them: what torch_xla replaced is put back, what torch misses of XLA is given to it."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch_xla
import torch_xla.core.xla_model as xm
from torch import nn

from tpuspec.tracer.rematerialization import keep_rematerialization


def restore_torch() -> None:
    """Puts torch's own nn.GRU and clip_grad_norm_ back, and mends torch.utils.checkpoint; once is enough.

    torch_xla replaces both for the whole process when it is imported: by a GRU that no CPU tensor can go through, nor
    an export, and a function that refuses foreach=True and puts a tensor on XLA where there is no gradient. torch's own
    work on XLA too.
    """
    for owner, name in ((nn, "GRU"), (nn.utils, "clip_grad_norm_")):
        replaced = getattr(owner, name)
        if replaced.__module__.startswith("torch_xla"):
            setattr(owner, name, replaced._orig)
    if not hasattr(torch, "xla"):
        torch._register_device_module("xla", _device_module())
    keep_rematerialization()


def _device_module() -> types.ModuleType:
    """Returns what torch.utils.checkpoint and torch.random.fork_rng need of a device: its random state."""
    module: Any = types.ModuleType("torch.xla", "The random state of XLA devices, for torch.utils.checkpoint.")
    module._initialized = True  # else torch.utils.checkpoint keeps no random state
    module.device, module.current_device, module.device_count = _as_current, _current, lambda: 1
    module.get_rng_state = lambda device=None: xm.get_rng_state(_name_of(device))
    module.set_rng_state = lambda state, device=None: xm.set_rng_state(state, _name_of(device))
    module.is_available = module.is_initialized = lambda: True
    return module


def _name_of(device: torch.device | int | str | None) -> str:
    if isinstance(device, int):
        return f"xla:{device}"
    return torch_xla._XLAC._xla_get_default_device() if device is None else str(device)


def _current() -> int:
    return int(_name_of(None).rpartition(":")[2])


@contextlib.contextmanager
def _as_current(device: torch.device | int | str) -> Iterator[None]:
    before = _name_of(None)
    torch_xla._XLAC._xla_set_default_device(_name_of(device))
    try:
        yield
    finally:
        torch_xla._XLAC._xla_set_default_device(before)
