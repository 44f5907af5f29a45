"""Tracing on one device what replicas will compute together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch_xla.runtime as xr

from tpuspec.errors import SpecError


@contextlib.contextmanager
def computing_as(num_replicas: int) -> Iterator[None]:
    """Makes torch_xla's collectives those of so many replicas within the block, though one device traces them.

    `xm.all_reduce`, `xm.all_gather` and `xm.optimizer_step` ask `xr.world_size` at each call.
    """
    world_size, ordinal = xr.world_size, xr.global_ordinal
    xr.world_size = lambda: num_replicas
    if num_replicas > 1:
        xr.global_ordinal = _refuse
    try:
        yield
    finally:
        xr.world_size, xr.global_ordinal = world_size, ordinal


def _refuse() -> int:
    raise SpecError("model_fn asks which replica it is (xr.global_ordinal, or xm.all_gather with pin_layout=True): one "
                    "program serves all replicas, so it must do the same on each. Gather with pin_layout=False, and "
                    "give a replica what differs in its rows.")
