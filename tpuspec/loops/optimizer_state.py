"""An optimizer's state in a checkpoint: checked before it is loaded.

Hyper-parameters are those that this run asks for, where it asks for others than the saved run did. Else they are the
saved ones: a hook may have changed them. Groups that a hook added, as where layers are unfrozen one by one, are added
anew.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from tpuspec.errors import CheckpointError

logger = logging.getLogger(__name__)

_CLASS, _ASKED, _ADDED = "class", "asked", "added"


def tell_of_inner(optimizer: torch.optim.Optimizer, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Warns of an optimizer within another one, as in a Lookahead: its state is not known here."""
    for name, inner in vars(optimizer).items():
        if isinstance(inner, torch.optim.Optimizer) and not any(inner is other for other in optimizers):
            outer, kind = type(optimizer).__name__, type(inner).__name__
            logger.warning(
                "%s keeps another optimizer (%s, in its attribute %r). Its steps are right, but checkpoints have the "
                "state of that %s only where state_dict() and load_state_dict() of %s pass it on, and on XLA each "
                "step is traced. A dict of both optimizers is saved, and can be captured.",
                outer, kind, name, kind, outer)


def hyper_parameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Returns the hyper-parameters of each group as they are now; those that are tensors are left out."""
    return [{key: value for key, value in group.items() if key != "params" and not isinstance(value, torch.Tensor)}
            for group in optimizer.param_groups]


def read_optimizer(optimizer: torch.optim.Optimizer, asked: list[dict[str, Any]],
                   model: nn.Module | None) -> dict[str, Any]:
    """Returns the state dict with the optimizer's class, the hyper-parameters it was made with, and groups added since.

    Of these the names of their parameters are kept, with whether each requires a gradient.
    """
    names = {parameter: name for name, parameter in model.named_parameters()} if model is not None else {}
    added = [[[names[parameter], parameter.requires_grad] for parameter in group["params"] if parameter in names]
             for group in optimizer.param_groups[len(asked):]]
    return {_CLASS: type(optimizer).__name__, _ASKED: asked, **({_ADDED: added} if added else {}),
            **optimizer.state_dict()}


def add_groups(optimizer: torch.optim.Optimizer, model: nn.Module | None, saved: Mapping[str, Any]) -> None:
    """Adds the groups that a hook of the saved run added, unless they are there.

    Raises:
      CheckpointError: the model has no such parameter, or another group has it.
    """
    added = saved.get(_ADDED, [])
    first = len(saved["param_groups"]) - len(added)
    if len(optimizer.param_groups) != first:
        return
    parameters = dict(model.named_parameters()) if model is not None else {}
    for names, group in zip(added, saved["param_groups"][first:], strict=True):
        try:
            found = [parameters[name].requires_grad_(requires_grad) for name, requires_grad in names]
            optimizer.add_param_group({**group, "params": found})
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"Restoring from checkpoint failed: a hook of the saved run added a group of the parameters "
                f"{[name for name, _ in names]} to {type(optimizer).__name__}, which cannot be added here: "
                f"{error}.") from error


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


def load_optimizer(name: str, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], *,
                   asked: list[dict[str, Any]], is_scheduled: bool, tell: bool) -> None:
    """Loads the state of the parameters, and the hyper-parameters that this run does not ask to be others.

    Args:
      name: of the optimizer; '' for a single one.
      optimizer: to load into.
      saved: what read_optimizer returned.
      asked: hyper-parameters that the optimizer was made with in this run.
      is_scheduled: whether a schedule sets them; it has done so for this step.
      tell: whether to warn of hyper-parameters that differ from the checkpoint's.
    """
    groups = []
    before = saved.get(_ASKED, [])
    for i, (now, kept) in enumerate(zip(optimizer.state_dict()["param_groups"], saved["param_groups"], strict=True)):
        was_asked = before[i] if i < len(before) else {}
        group = {**kept, **now, "params": kept["params"]}
        for key, value in now.items():
            if key == "params" or key not in kept or _same(value, kept[key]):
                continue
            if not is_scheduled and key in was_asked and key in asked[i] and _same(was_asked[key], asked[i][key]):
                group[key] = kept[key]
            elif tell:
                logger.warning("optimizer%s, group %d: %s is %s as this run asks; the checkpoint had %s.",
                               f" {name!r}" if name else "", i, key, value, kept[key])
        groups.append(group)
    # torch keeps counts of steps as they are given: each replica needs its own.
    state = {index: {key: _own(value) for key, value in values.items()} if isinstance(values, Mapping) else _own(values)
             for index, values in saved["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return torch.equal(torch.as_tensor(a).cpu(), torch.as_tensor(b).cpu())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return list(a) == list(b)
    return bool(a == b)
