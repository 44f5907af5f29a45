"""All hosts start from the chief's module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tpuspec.errors import SpecError
from tpuspec.spec.coordinator import Coordinator


def start_from_chief(model: nn.Module, coordinator: Coordinator) -> None:
    """Gives parameters and buffers of a module the chief's values; one host has them already.

    Raises:
      SpecError: this host built another module.
    """
    if coordinator.num_hosts == 1:
        return
    state = [(name, tensor) for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)]
    described = [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in state]
    if coordinator.exchange(described, name="the module's parameters")[0] != described:
        raise SpecError(f"host {coordinator.host_index} built another module than the chief. model(params) must return "
                        "the same on every host.")
    values = coordinator.share([tensor.detach().cpu() for _, tensor in state])
    with torch.no_grad():
        for (_, tensor), value in zip(state, values, strict=True):
            tensor.copy_(value)
