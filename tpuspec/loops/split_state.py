"""State that no host has whole: what of a session may be read in pieces, and loaded from a checkpoint piece by piece.

That is the state of modules and optimizers whose state dicts are torch's own: other code may read the tensors, which
makes them whole on every host.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tpuspec.checkpoint.stored import StoredTensor, read_all
from tpuspec.spec.backend import Backend, Replica, SplitState
from tpuspec.spec.scaffold import Scaffold

_OF_TORCH = ("torch.nn.modules.", "torch.optim.")
_MODULE_METHODS = ("state_dict", "load_state_dict", "_save_to_state_dict", "_load_from_state_dict", "get_extra_state",
                   "set_extra_state")
_MODULE_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
                 "_load_state_dict_post_hooks")
_OPTIMIZER_METHODS = ("state_dict", "load_state_dict")
_OPTIMIZER_HOOKS = ("_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks",
                    "_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks")


def may_be_in_pieces(backend: Backend, replica: Replica, scaffold: Scaffold) -> bool:
    """Whether checkpoints of a replica's state may be made of the pieces that each host has."""
    return backend.split_state is not None and scaffold.saver is None and (
        replica.model is None or _is_plain_module(replica.model)) and all(
            map(_is_plain_optimizer, replica.optimizers.values()))


def load_stored_model(backend: Backend, replica: Replica, tensors: Mapping[str, Tensor | StoredTensor]) -> bool:
    """Loads a module's state dict, of which each host reads what it needs; returns whether it did.

    Args:
      backend: of the replica.
      replica: its module fits.
      tensors: of a checkpoint.
    """
    split, module = backend.split_state, replica.model
    if split is None or module is None or not _is_plain_module(module) or not any(
            isinstance(value, StoredTensor) for value in tensors.values()):
        return False
    own = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, value in tensors.items():
            if isinstance(value, Tensor):
                own[name].copy_(value)
    split.take_stored(replica, [(own[name], value) for name, value in tensors.items()
                                if isinstance(value, StoredTensor)])
    return True


class StoredOptimizer:
    """The state dict of an optimizer in a checkpoint, whose tensors each host reads as far as it needs them.

    Args:
      backend: of the optimizer.
      optimizer: over the same parameters.
      saved: what the checkpoint has.

    Attributes:
      saved: to be loaded as a state dict is; `fill` comes next.
    """

    def __init__(self, backend: Backend, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
        self._split, self._optimizer = backend.split_state, optimizer
        self._stored: list[tuple[Tensor, str, StoredTensor]] = []
        self.saved = read_all(saved) if self._split is None or not _is_plain_optimizer(optimizer) else {
            **saved, "state": self._without_values(self._split, saved["state"])}

    def _without_values(self, split: SplitState, state: Mapping[int, Any]) -> dict[int, Any]:
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        found = [(index, key, value) for index, values in state.items() if isinstance(values, Mapping)
                 for key, value in values.items() if isinstance(value, StoredTensor)]
        # As torch casts them.
        dtypes = [parameters[index].dtype if parameters[index].is_floating_point() else value.dtype
                  for index, _, value in found]
        empty = dict(zip([(index, key) for index, key, _ in found],
                         split.like_stored([value for *_, value in found], dtypes), strict=True))
        self._stored = [(parameters[index], key, value) for index, key, value in found]
        return {index: {key: empty[index, key] if (index, key) in empty else read_all(value)
                        for key, value in values.items()} if isinstance(values, Mapping) else read_all(values)
                for index, values in state.items()}

    def fill(self, replica: Replica) -> None:
        """Reads the tensors, once the state dict is loaded."""
        if self._split is not None and self._stored:
            self._split.take_stored(replica, [(self._optimizer.state[parameter][key], stored)
                                              for parameter, key, stored in self._stored])


def _is_plain_module(module: nn.Module) -> bool:
    """Whether no code but torch's own has a say in the state dict."""
    return all(_is_plain(part, _MODULE_METHODS, _MODULE_HOOKS) for part in module.modules())


def _is_plain_optimizer(optimizer: torch.optim.Optimizer) -> bool:
    """As `_is_plain_module`."""
    return _is_plain(optimizer, _OPTIMIZER_METHODS, _OPTIMIZER_HOOKS)


def _is_plain(part: object, methods: tuple[str, ...], hooks: tuple[str, ...]) -> bool:
    if any(getattr(part, name, None) for name in hooks) or any(name in vars(part) for name in methods):
        return False
    return all(_home(type(part), name).startswith(_OF_TORCH) for name in methods)


def _home(kind: type, name: str) -> str:
    """Returns the module that defines a method of a class."""
    return next((base.__module__ for base in kind.__mro__ if name in vars(base)), "") + "."
