"""Names of operations in a program: the module that computes each one, and the line of Python code."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from tpuspec.tracer import graph

_WITH_NAMES = "XLA_HLO_DEBUG"


@contextlib.contextmanager
def operations_named(model: nn.Module | None) -> Iterator[None]:
    """Lets operations that are traced within the block have the names of the modules that call them, and lines.

    Those of the backward pass have no module. What is computed, and a graph's hash, stay as they are.
    """
    names = {} if model is None else {id(part): name for name, part in model.named_modules() if name}
    scopes: list[tuple[int, Any]] = []

    def enter(module: nn.Module, args: Any) -> None:
        if (name := names.get(id(module))) is not None:
            scopes.append((id(module), graph.scope(name)))

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        if scopes and scopes[-1][0] == id(module):
            scopes.pop()

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        with graph.noting_lines():
            yield
    finally:
        while scopes:
            scopes.pop()
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def names_written() -> Iterator[None]:
    """Writes the names of operations into the programs that the block makes of graphs."""
    before = os.environ.get(_WITH_NAMES)
    os.environ[_WITH_NAMES] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_WITH_NAMES]
        else:
            os.environ[_WITH_NAMES] = before
