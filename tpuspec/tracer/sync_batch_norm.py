"""nn.SyncBatchNorm over replicas. torch's own knows processes only: on XLA it would not sync, and say nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import torch_xla.core.xla_model as xm
from torch import Tensor, nn

from tpuspec.errors import SpecError

_of_torch = nn.SyncBatchNorm.forward
_num_replicas = 1


@contextlib.contextmanager
def syncing_batch_norm(num_replicas: int) -> Iterator[None]:
    """Makes nn.SyncBatchNorm normalize with the statistics of the rows of all replicas within the block."""
    global _num_replicas
    before, _num_replicas = _num_replicas, num_replicas
    nn.SyncBatchNorm.forward = _forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        _num_replicas = before
        nn.SyncBatchNorm.forward = _of_torch


def _forward(module: nn.SyncBatchNorm, input: Tensor) -> Tensor:
    if input.device.type != "xla":
        return _of_torch(module, input)
    if module.process_group is not None:
        raise SpecError("SyncBatchNorm(process_group=...) syncs some of the processes; on XLA it syncs all replicas. "
                        "Leave process_group None.")
    module._check_input_dim(input)
    module._check_non_zero_input_channels(input)
    mean_before, var_before = module.running_mean, module.running_var
    if not module.training:
        return F.batch_norm(input, mean_before, var_before, module.weight, module.bias, mean_before is None,
                            module.momentum or 0.0, module.eps)
    size = input.numel() // input.size(1) * _num_replicas
    if size == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")
    wide = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    dims, shape = [0, *range(2, input.ndim)], [1, -1, *[1] * (input.ndim - 2)]
    mean = _mean_of_replicas(wide.mean(dims))
    centered = wide - mean.view(shape)
    var = _mean_of_replicas(centered.square().mean(dims))
    normalized = centered * (var + module.eps).rsqrt().view(shape)
    if module.track_running_stats:
        _track(module, mean.detach(), var.detach() * (size / (size - 1)))
    if module.weight is not None:
        normalized = normalized * module.weight.view(shape) + module.bias.view(shape)
    return normalized.to(input.dtype)


def _track(module: nn.SyncBatchNorm, mean: Tensor, var: Tensor) -> None:
    """Moves the running statistics towards those of this batch; `var` is unbiased."""
    with torch.no_grad():
        count: Any = module.num_batches_tracked
        count.add_(1)
        share = 1 / count if module.momentum is None else module.momentum  # None: the mean of all batches
        for running, newest in ((module.running_mean, mean), (module.running_var, var)):
            if running is not None:
                running.mul_(1 - share).add_((newest * share).to(running.dtype))


def _mean_of_replicas(values: Tensor) -> Any:
    return values if _num_replicas == 1 else _Mean.apply(values)


class _Mean(torch.autograd.Function):
    """The mean of a tensor over replicas."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Any:
        return xm.all_reduce(xm.REDUCE_SUM, values, scale=1 / _num_replicas)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return xm.all_reduce(xm.REDUCE_SUM, gradients[0], scale=1 / _num_replicas)  # every replica's loss has it
