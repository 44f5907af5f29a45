"""An optimizer's state in a checkpoint: checked before it is loaded; hyper-parameters are those of this run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from tpuspec.errors import CheckpointError

logger = logging.getLogger(__name__)

_CLASS = "class"


def read_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns the state dict with the name of the optimizer's class."""
    return {_CLASS: type(optimizer).__name__, **optimizer.state_dict()}


def check_optimizer_state(name: str, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Checks that a saved state is that of such an optimizer over as many parameters.

    Raises:
      CheckpointError: another class, or other groups of parameters.
    """
    prefix = f"Restoring from checkpoint failed: optimizer{f' {name!r}' if name else ''}"
    if saved[_CLASS] != type(optimizer).__name__:
        raise CheckpointError(f"{prefix} is {type(optimizer).__name__}, the checkpoint's is {saved[_CLASS]}, a "
                              "mismatch. Take that one, or another model_dir.")
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    saved_sizes = [len(group["params"]) for group in saved["param_groups"]]
    if sizes != saved_sizes:
        raise CheckpointError(f"{prefix} has groups of {sizes} parameters, the checkpoint's of {saved_sizes}, a "
                              "mismatch.")


def load_optimizer(name: str, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], *, tell: bool) -> None:
    """Loads the state of the parameters; hyper-parameters stay as the run asks for them.

    Args:
      name: of the optimizer; '' for a single one.
      optimizer: to load into.
      saved: what read_optimizer returned.
      tell: whether to warn of hyper-parameters that differ from the checkpoint's.
    """
    groups = []
    for i, (asked, kept) in enumerate(zip(optimizer.state_dict()["param_groups"], saved["param_groups"], strict=True)):
        for key, value in asked.items():
            if tell and key != "params" and key in kept and not _same(value, kept[key]):
                logger.warning("optimizer%s, group %d: %s is %s as this run asks; the checkpoint had %s.",
                               f" {name!r}" if name else "", i, key, value, kept[key])
        groups.append({**kept, **asked, "params": kept["params"]})
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return torch.equal(torch.as_tensor(a).cpu(), torch.as_tensor(b).cpu())
    return bool(a == b)
