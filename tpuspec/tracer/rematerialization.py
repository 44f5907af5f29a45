"""torch.utils.checkpoint saves memory on XLA: what it computes again is kept apart from what was computed before."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
import torch_xla.core.xla_model as xm
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree


def keep_rematerialization() -> None:
    """Lets torch.utils.checkpoint start its second computation from inputs behind a barrier; once is enough.

    The graph has the same operations of the same inputs twice then, and XLA would merge them, and keep the results in
    memory from the first use to the second. Without the reentrant form the parameters of a module go behind the barrier
    too: what is computed from them alone (a cast, a gather of their shards) is else kept likewise.
    """
    if hasattr(torch_checkpoint.detach_variable, "__wrapped__"):
        return
    torch_checkpoint.detach_variable = _apart_where_reentrant(torch_checkpoint.detach_variable)
    torch_checkpoint._checkpoint_without_reentrant_generator = _apart_where_not_reentrant(
        torch_checkpoint._checkpoint_without_reentrant_generator)


def _apart_where_reentrant(detach_inputs: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(detach_inputs)
    def detach_apart(inputs: Any) -> Any:
        return detach_inputs(_apart(inputs) if isinstance(inputs, tuple) else inputs)

    return detach_apart


def _apart_where_not_reentrant(generate: Callable[..., Iterator[None]]) -> Callable[..., Iterator[None]]:
    @functools.wraps(generate)
    def generate_apart(fn: Callable[..., Any], *arguments: Any, **keywords: Any) -> Iterator[None]:
        # The first time torch calls the function itself, not through here.
        return generate(functools.wraps(fn, updated=())(functools.partial(_compute_again, fn)), *arguments, **keywords)

    return generate_apart


def _compute_again(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    owner = fn if isinstance(fn, nn.Module) else getattr(fn, "__self__", None)
    parameters = dict(owner.named_parameters()) if isinstance(owner, nn.Module) else {}
    args, kwargs, parameters = _apart((args, kwargs, parameters))
    if not parameters:
        return fn(*args, **kwargs)
    assert isinstance(owner, nn.Module)
    with _reparametrize_module(owner, parameters):
        return fn(*args, **kwargs)


def _apart(tree: Any) -> Any:
    """Returns the same values, those on XLA as tensors of their own that XLA takes for unknown ones."""
    leaves, form = pytree.tree_flatten(tree)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.device.type == "xla"]
    if not places:
        return tree
    for place, apart in zip(places, _behind_barrier([leaves[place] for place in places]), strict=True):
        leaves[place] = apart
    return pytree.tree_unflatten(leaves, form)


def _behind_barrier(tensors: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        copies = [tensor.detach().clone() for tensor in tensors]
        xm.optimization_barrier_(copies)
    return [copy.requires_grad_(tensor.requires_grad) for copy, tensor in zip(copies, tensors, strict=True)]
