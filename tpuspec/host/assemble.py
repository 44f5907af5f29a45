"""Puts the outputs of all replicas together: concatenated in replica order, padding rows dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tpuspec.spec.results import StepRows


def assemble(replica_tensors: Sequence[Mapping[str, Any]], rows: StepRows) -> dict[str, Any]:
    """Joins each group's tensors over replicas.

    Args:
      replica_tensors: for each replica, group -> list or dict of tensors, or one tensor ('loss').
      rows: which rows of the concatenated batch are real.

    Returns:
      group -> the same container of tensors [real rows, ...]; tensors that do not have the batch's rows (a host_call's
      [1] becomes [num_replicas]) keep all of theirs. A scalar 'loss' becomes [num_replicas], padding replicas included.
    """
    num_rows = rows.mask.shape[0]

    def join(parts: Sequence[Tensor]) -> Tensor:
        if parts[0].ndim == 0:
            return torch.stack(list(parts))
        joined = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        if joined.shape[0] == num_rows and rows.num_rows < num_rows:
            return joined[rows.mask]
        return joined

    joined: dict[str, Any] = {}
    for group, first in replica_tensors[0].items():
        parts = [tensors[group] for tensors in replica_tensors]
        if isinstance(first, Tensor):
            joined[group] = join(parts)
        elif isinstance(first, Mapping):
            joined[group] = {key: join([part[key] for part in parts]) for key in first}
        else:
            joined[group] = [join([part[i] for part in parts]) for i in range(len(first))]
    return joined
