"""Optimizers whose steps can be replayed: scheduled learning rates as inputs of the graph, counters on the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tpuspec.errors import ConfigError
from tpuspec.runtime import graph
from tpuspec.spec.backend import Replica

_NOT_CAPTURABLE_ON_XLA = (torch.optim.Adadelta,)
"""Has the setting, and refuses it on XLA devices."""


def make_capturable(optimizer: torch.optim.Optimizer) -> None:
    """Moves an optimizer to the form that computes on the device only, where torch has one (`capturable=True`).

    Raises:
      ConfigError: it needs what XLA does not have.
    """
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise ConfigError("SparseAdam needs sparse gradients, which XLA does not have. Take Adam, with "
                          "nn.Embedding(sparse=False), or train with use_tpu=False.")
    if isinstance(optimizer, _NOT_CAPTURABLE_ON_XLA):
        return
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True
            for parameter in group["params"]:
                step = optimizer.state.get(parameter, {}).get("step")
                if isinstance(step, Tensor) and step.device != parameter.device:
                    optimizer.state[parameter]["step"] = step.to(parameter.device)


def is_scheduled(optimizer: torch.optim.Optimizer) -> bool:
    """Tells whether a torch learning rate schedule was made for an optimizer."""
    return getattr(optimizer.step, "_wrapped_by_lr_sched", False)


class LearningRates:
    """The learning rates of scheduled optimizers, which change from step to step and are sent like the batch.

    Within a step each is a tensor on the device; outside it stays the float that schedules and users read and set. The
    first replica's optimizers have the schedules; the others follow.

    Args:
      replicas: the local replicas.
    """

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._first = replicas[0]
        self._sent: dict[int, tuple[list[float], list[Tensor]]] = {}

    def groups(self, replica: Replica) -> list[tuple[torch.optim.Optimizer, dict[str, Any]]]:
        """Returns the scheduled optimizers of a replica with their groups."""
        return [(replica.optimizers[name], group) for name, optimizer in self._first.optimizers.items()
                if is_scheduled(optimizer) and name in replica.optimizers
                for group in replica.optimizers[name].param_groups]

    def read(self) -> list[float]:
        """Returns the learning rates of the next step, one a group."""
        return [float(group["lr"]) for _, group in self.groups(self._first)]

    def others(self) -> list[Any]:
        """Returns what else a schedule may move: the other hyper-parameters of its groups."""
        return [value for _, group in self.groups(self._first) for key, value in group.items()
                if key not in ("params", "lr", "initial_lr") and not isinstance(value, Tensor)]

    def sent(self, replica: Replica) -> list[Tensor]:
        """Returns the learning rates on a replica's device, one a group; sent anew where one changed."""
        rates = self.read()
        if not rates:
            return []
        kept = self._sent.get(replica.ordinal)
        if kept is None or kept[0] != rates:
            kept = (rates, graph.send([torch.tensor(rate) for rate in rates], str(replica.device)))
            self._sent[replica.ordinal] = kept
        return kept[1]

    @contextlib.contextmanager
    def in_place(self, replica: Replica, sent: Sequence[Tensor]) -> Iterator[None]:
        """Puts the tensors into the optimizers' groups within the block."""
        groups = self.groups(replica)
        floats = [group["lr"] for _, group in groups]
        for (optimizer, group), tensor in zip(groups, sent, strict=True):
            # SGD multiplies by a tensor only if it requires a gradient, and reads it to the host otherwise.
            group["lr"] = tensor.requires_grad_() if type(optimizer) is torch.optim.SGD else tensor
        try:
            yield
        finally:
            for (_, group), tensor, number in zip(groups, sent, floats, strict=True):
                if group["lr"] is not tensor:
                    continue  # user code set another one
                group["lr"] = tensor.detach().cpu().item() if graph.pending([tensor])[0] else number
