"""Puts the outputs of all replicas together: concatenated in replica order, padding rows dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tpuspec.spec.results import StepRows


def join_rows(parts: Sequence[Any], rows: StepRows) -> Any:
    """Joins one group's tensors over replicas.

    Args:
      parts: for each replica, a list or dict of tensors, or one tensor ('loss').
      rows: which rows of the concatenated batch are real.

    Returns:
      The same container of tensors [real rows, ...]; tensors that do not have the batch's rows (a host_call's [1]
      becomes [num_replicas]) keep all of theirs. Scalars become [num_replicas], padding replicas included.
    """
    num_rows = rows.mask.shape[0]
    padded = rows.num_rows < num_rows

    def join(tensors: Sequence[Tensor]) -> Tensor:
        if tensors[0].ndim == 0:
            return torch.stack(list(tensors))
        joined = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
        return joined[rows.mask] if padded and joined.shape[0] == num_rows else joined

    first = parts[0]
    if isinstance(first, Tensor):
        return join(parts)
    if isinstance(first, Mapping):
        return {key: join([part[key] for part in parts]) for key in first}
    return [join([part[i] for part in parts]) for i in range(len(first))]
