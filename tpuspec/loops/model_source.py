"""Where the module and its optimizers come from: what the user gave the Trainer, called and checked."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from tpuspec.errors import ConfigError, ConfigTypeError
from tpuspec.loops.optimizer_state import tell_of_inner
from tpuspec.placement import copy_without_memory, without_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where the module and its optimizers come from.

    Attributes:
      model: a function of params that returns a module, a module, or None.
      optimizer: a function of (module, params) that returns an optimizer or a dict of them; None without training.
      params: the Trainer's.
      scheduler: a function of (optimizer, params) that returns a learning rate schedule or a dict of them; None for
        constant rates.
      warm_start: loads weights into a module that was just built; None leaves it as it is.
      read_evaluations: reads the log of evaluations of a name, None for the unnamed ones: step -> metric -> value.
    """

    model: Callable[[Mapping[str, Any]], nn.Module] | nn.Module | None
    optimizer: Callable[..., Any] | None
    params: Mapping[str, Any]
    scheduler: Callable[..., Any] | None = None
    warm_start: Callable[[nn.Module | None], None] | None = None
    read_evaluations: Callable[[str | None], Mapping[int, Mapping[str, float]]] = lambda name: {}

    def build_model(self) -> nn.Module | None:
        """Builds the module on the host.

        Raises:
          ConfigTypeError: the function returned no module.
        """
        if self.model is None:
            return None
        if isinstance(self.model, nn.Module):
            return check_materialized(self.model)
        module = self.model(copy.deepcopy(dict(self.params)))
        if not isinstance(module, nn.Module):
            raise ConfigTypeError(f"model must return a torch.nn.Module; got {type(module).__name__}.")
        return check_materialized(module)

    def without_memory(self) -> ModelSource:
        """Returns a source of modules whose parameters have shapes, and no memory where their function allows it."""
        if self.model is None:
            return self
        if isinstance(self.model, nn.Module):
            return dataclasses.replace(self, model=copy_without_memory(self.model))
        return dataclasses.replace(self, model=self._build_without_memory)

    def _build_without_memory(self, params: Mapping[str, Any]) -> nn.Module:
        assert self.model is not None and not isinstance(self.model, nn.Module)
        try:
            with without_memory():
                return self.model(copy.deepcopy(dict(params)))
        except Exception as error:
            logger.warning("the model function needs the values of its parameters (%s: %s), so they are made, in this "
                           "host's memory.", type(error).__name__, (str(error).splitlines() or [""])[0])
            return self.model(copy.deepcopy(dict(params)))

    def build_optimizers(self, module: nn.Module | None) -> dict[str, torch.optim.Optimizer]:
        """Builds the optimizers over a placed module, by name; the name of a single one is ''.

        Raises:
          ConfigTypeError: the function returned something else.
        """
        if self.optimizer is None:
            return {}
        made = self.optimizer(module, copy.deepcopy(dict(self.params)))
        optimizers = dict(made) if isinstance(made, Mapping) else {"": made}
        for name, optimizer in optimizers.items():
            if not isinstance(name, str) or not isinstance(optimizer, torch.optim.Optimizer):
                raise ConfigTypeError("optimizer must return a torch.optim.Optimizer or a dict of name -> Optimizer; "
                                      f"got {type(optimizer).__name__}" + (f" for {name!r}." if name else "."))
            tell_of_inner(optimizer, optimizers.values())
        return optimizers


def check_materialized(module: nn.Module) -> nn.Module:
    """Returns a module whose parameters and buffers have their shapes.

    Raises:
      ConfigError: a lazy module has not seen a batch yet.
    """
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        if is_lazy(tensor):
            raise ConfigError(f"{name} of the model has no shape yet. Run one batch through a lazy module on the host, "
                              "in the model function, before you return it.")
    return module
