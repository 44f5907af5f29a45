"""torch's AveragedModel on the device: torch's own reads a count from there, to know whether it is the first time."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

_of_torch = swa_utils.AveragedModel.update_parameters


@contextlib.contextmanager
def averages_on_device() -> Iterator[None]:
    """Lets averaged models that are on XLA be updated without a read, within the block."""
    swa_utils.AveragedModel.update_parameters = _update_parameters
    try:
        yield
    finally:
        swa_utils.AveragedModel.update_parameters = _of_torch


def _update_parameters(self: swa_utils.AveragedModel, model: nn.Module) -> None:
    count = self.n_averaged
    if count.device.type != "xla":
        _of_torch(self, model)
        return
    if self.use_buffers:
        own = itertools.chain(self.module.parameters(), self.module.buffers())
        new = itertools.chain(model.parameters(), model.buffers())
    else:
        own, new = self.parameters(), model.parameters()
    pairs = [(averaged.detach(), current.detach()) for averaged, current in zip(own, new, strict=False)]
    with torch.no_grad():
        for (averaged, current), value in zip(pairs, _averages(self, pairs, count), strict=True):
            averaged.copy_(torch.where(count == 0, current, value))
        if not self.use_buffers:
            for averaged, current in zip(self.module.buffers(), model.buffers(), strict=False):
                averaged.detach().copy_(current.detach())
        count.add_(1)


def _averages(averaged_model: swa_utils.AveragedModel, pairs: Sequence[tuple[Tensor, Tensor]], count: Tensor,
              ) -> list[Tensor]:
    """Returns the averages as they are from the second time on."""
    several, single = averaged_model.multi_avg_fn, averaged_model.avg_fn
    if several is None or (getattr(several, "__module__", "") == swa_utils.__name__ and (
            several.__qualname__.startswith("get_swa_multi_avg_fn"))):  # the same formula, with the weight as a number
        if several is not None or single is None:
            single = swa_utils.get_swa_avg_fn()
        return [single(averaged, current, count) for averaged, current in pairs]
    kinds: dict[torch.dtype, list[int]] = {}
    for number, (averaged, _) in enumerate(pairs):
        kinds.setdefault(averaged.dtype, []).append(number)
    values = [averaged.clone() for averaged, _ in pairs]
    for numbers in kinds.values():  # torch groups them so, and its functions look at the first one's dtype
        several([values[i] for i in numbers], [pairs[i][1] for i in numbers], count)
    return values
