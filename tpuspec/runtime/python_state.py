"""What a step's Python code could remember from one call to the next, as values that can be compared.

A captured step does not run its Python code, so a model_fn that counts, appends or draws random numbers on the host
cannot be replayed. Its closure, the globals and defaults it uses, the objects it is bound to, its modules' attributes
and its optimizers' host values are looked at before and after a trace. What only the spec's host
functions use is left out: they run on the worker, at any time, and may remember what they like.
"""

from __future__ import annotations

import builtins
import collections
import dataclasses
import dis
import enum
import functools
import hashlib
import inspect
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tpuspec.runtime.optimizer_places import is_number
from tpuspec.spec.backend import Replica

Snapshot = dict[str, Any]
"""Path of a value -> what it is compared by."""

_RANDOM = ("Python's random numbers, random", "numpy's random numbers, np.random", "torch's random numbers on the host")
_MAX_DEPTH = 8
_MAX_ITEMS = 200
_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, range, slice)
_LIBRARIES = ("torch", "torch_xla", "torchmetrics", "numpy", "tpuspec.", "tensorboard", "omegaconf", "hydra")


class HostCode:
    """The code of the host functions of a backend's steps, in all modes, as far as traces have told of it.

    model_fn names the host functions of every mode, and the step of each must leave out all of them.

    Attributes:
      codes: code objects.
      names: names that those which are methods use, themselves and in methods that they call.
    """

    def __init__(self) -> None:
        self.codes: frozenset[types.CodeType] = frozenset()
        self.names: frozenset[str] = frozenset()

    def add(self, functions: Iterable[Any]) -> None:
        """Adds the code of functions; None among them is passed over."""
        for function in functions:
            while isinstance(function, functools.partial):
                function = function.func
            if not isinstance(function, types.FunctionType | types.MethodType | type(None)):
                function = getattr(function, "__call__", None)  # noqa: B004 - its method, not whether there is one
            if isinstance(function, types.MethodType):
                owner, function = type(function.__self__), function.__func__
                if isinstance(function, types.FunctionType):
                    self.names |= _names_by_methods(function.__code__, owner, frozenset())
            if isinstance(function, types.FunctionType) and function.__code__ not in self.codes:
                self.codes |= {function.__code__}


def settings_of(step: Callable[..., Any], model: nn.Module | None, host_code: HostCode) -> Snapshot:
    """Returns the plain values that a step reads: closures, defaults, globals, bound objects, attributes of modules.

    Of a module only those that its class or the step's code names: a hook may leave other ones there.
    """
    walk = _walked({"": step}, host_code, modules=False)
    for path, module in () if model is None else model.named_modules():
        named = _names_of_class(type(module)) | walk.used
        for name, value in list(vars(module).items()):
            if name in named and name not in _MODULE_INTERNALS:
                walk.visit(f"model.{path}.{name}".replace("..", "."), value, 1)
    return walk.snapshot


def memory_of(step: Callable[..., Any], replica: Replica, host_code: HostCode) -> Snapshot:
    """Returns all that a step's Python code could change: `settings_of`, modules, optimizers, random state."""
    roots = {"": step} if replica.model is None else {"": step, "model": replica.model}
    snapshot = _walked(roots, host_code, modules=True).snapshot
    for name, optimizer in replica.optimizers.items():
        path = f"optimizer {name!r}" if name else "optimizer"
        for number, group in enumerate(optimizer.param_groups):
            for key, value in group.items():
                if key != "params" and not isinstance(value, Tensor) and not is_number(value):
                    snapshot[f"{path} {key} of group {number}"] = repr(value)
        for index, state in enumerate(optimizer.state.values()):
            for key, value in state.items():
                if is_number(value):
                    continue
                if not isinstance(value, Tensor):
                    snapshot[f"{path} state {index} {key}"] = repr(value) if isinstance(value, _SIMPLE) else id(value)
                elif value.device.type == "cpu":
                    snapshot[f"{path} state {index} {key}"] = (id(value), value._version)
    snapshot[_RANDOM[0]] = _digest(repr(random.getstate()).encode())
    snapshot[_RANDOM[1]] = _digest(repr(np.random.get_state(legacy=False)).encode())
    snapshot[_RANDOM[2]] = _digest(torch.get_rng_state().numpy().tobytes())
    return snapshot


def changed(before: Snapshot, after: Snapshot) -> list[str]:
    """Names what differs between two snapshots, old and new, as far as the newer one has it."""
    return [f"{path} ({_short(before.get(path, _Absent))} -> {_short(after[path])})"
            for path in after if before.get(path, _Absent) != after[path]]


def is_random_state(change: str) -> bool:
    """Whether a line of `changed` is of the process's random state, which all its threads share."""
    return change.startswith(_RANDOM)


class _Absent:
    """Stands for no value."""


def _short(value: Any) -> str:
    if value is _Absent:
        return "absent"
    if isinstance(value, _Opaque):
        return value.told
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


@dataclasses.dataclass(frozen=True, slots=True)
class _Opaque:
    """A value compared by a number that says nothing to people.

    Attributes:
      number: compared.
      told: what people are told.
    """

    number: Any
    told: str


def _digest(data: bytes) -> _Opaque:
    return _Opaque(hashlib.blake2b(data, digest_size=8).digest(), "a state")


def _walked(roots: Mapping[str, Any], host_code: HostCode, *, modules: bool) -> _Walk:
    hidden = host_code.names
    if hidden:  # but for what the step uses too
        scout = _Walk(host_code.codes, frozenset(), modules=modules)
        for path, value in roots.items():
            scout.visit(path, value, 0)
        hidden -= scout.used
    walk = _Walk(host_code.codes, hidden, modules=modules)
    for path, value in roots.items():
        walk.visit(path, value, 0)
    return walk


class _Walk:
    """Visits values by path; each object once.

    Args:
      host_codes: of functions that are passed over.
      hidden: names of attributes that are passed over.
      modules: whether the attributes of modules are visited.

    Attributes:
      snapshot: what was found.
      used: names that the functions use which were visited.
    """

    def __init__(self, host_codes: frozenset[types.CodeType], hidden: frozenset[str], *, modules: bool) -> None:
        self.snapshot: Snapshot = {}
        self.used: set[str] = set()
        self._host_codes, self._hidden, self._modules = host_codes, hidden, modules
        self._seen: set[int] = set()

    def visit(self, path: str, value: Any, depth: int) -> None:
        if isinstance(value, (enum.Enum, *_SIMPLE)):
            self.snapshot[path] = value
            return
        if isinstance(value, Tensor):
            self.snapshot[path] = self._tensor(value)
            return
        if id(value) in self._seen or depth > _MAX_DEPTH:
            return
        self._seen.add(id(value))
        for name, item in self._parts(path, value):
            self.visit(name, item, depth + 1)

    def _tensor(self, tensor: Tensor) -> _Opaque:
        told = f"tensor {list(tensor.shape)} on {tensor.device}"
        # A device tensor by its object: what it stands for now is no value of Python's.
        return _Opaque((id(tensor), tensor._version if tensor.device.type == "cpu" else None), told)

    def _parts(self, path: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, types.FunctionType):
            yield from self._function(path, value)
        elif isinstance(value, types.MethodType):
            self._use(value.__func__, type(value.__self__))
            yield f"{path}", value.__func__
            yield f"{path} self" if path else "self", value.__self__
        elif isinstance(value, functools.partial):
            yield path, value.func
            yield f"{path} arguments".strip(), (value.args, value.keywords)
        elif isinstance(value, nn.Module):
            if self._modules:
                yield from self._module(path, value)
        elif isinstance(value, np.ndarray):
            if value.nbytes <= 1 << 20:
                self.snapshot[path] = _digest(value.tobytes())
        elif isinstance(value, np.random.Generator):
            self.snapshot[path] = _digest(repr(value.bit_generator.state).encode())
        elif isinstance(value, random.Random):
            self.snapshot[path] = _digest(repr(value.getstate()).encode())
        elif isinstance(value, Mapping):
            yield from self._items(path, value, list(value.items()))
        elif isinstance(value, list | tuple | collections.deque):
            yield from self._items(path, value, list(enumerate(value)))
        elif isinstance(value, set | frozenset):
            self.snapshot[path] = (len(value), frozenset(map(repr, value)) if len(value) <= _MAX_ITEMS else None)
        elif type(value).__module__ == "itertools":
            self.snapshot[path] = repr(value)
        elif isinstance(value, types.GeneratorType):
            self.snapshot[path] = (value.gi_frame is None, value.gi_frame and value.gi_frame.f_lasti)
        elif dataclasses.is_dataclass(value) or not _is_library(type(value)):
            for name, item in list(getattr(value, "__dict__", {}).items()):
                if name not in self._hidden:
                    yield f"{path}.{name}", item
            for name in _slot_names(type(value)):
                if hasattr(value, name):
                    yield f"{path}.{name}", getattr(value, name)
            if isinstance(call := vars(type(value)).get("__call__"), types.FunctionType):
                self._use(call, type(value))
                yield path, call

    def _use(self, method: Any, owner: type) -> None:
        if isinstance(method, types.FunctionType) and method.__code__ not in self._host_codes:
            self.used |= _names_by_methods(method.__code__, owner, self._host_codes)

    def _items(self, path: str, container: Any, items: list[tuple[Any, Any]]) -> Iterator[tuple[str, Any]]:
        self.snapshot[f"number of items in {path}"] = len(container)
        for key, item in [*items[:_MAX_ITEMS // 2], *items[_MAX_ITEMS // 2:][-_MAX_ITEMS // 2:]]:
            yield f"{path}[{key!r}]", item

    def _function(self, path: str, function: types.FunctionType) -> Iterator[tuple[str, Any]]:
        if _is_library(function):
            return
        code = function.__code__
        if code in self._host_codes:
            return
        global_names, closed_names = _names_of(code, self._host_codes)
        self.used |= global_names
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                if name in closed_names:
                    yield name, cell.cell_contents
            except ValueError:  # not assigned yet
                continue
        for name, value in (function.__kwdefaults__ or {}).items():
            yield f"default {name}", value
        for i, value in enumerate(function.__defaults__ or ()):
            yield f"default {i} of {function.__qualname__}", value
        for name in sorted(global_names):
            if name in function.__globals__ and not hasattr(builtins, name):
                value = function.__globals__[name]
                if not isinstance(value, types.ModuleType | type):
                    yield name, value

    def _module(self, path: str, module: nn.Module) -> Iterator[tuple[str, Any]]:
        for name, value in list(vars(module).items()):
            if name not in _MODULE_INTERNALS and (
                    not name.startswith("_") or isinstance(value, (*_SIMPLE, list, dict))):
                yield f"{path}.{name}", value
        for name, child in module._modules.items():
            if child is not None:
                yield f"{path}.{name}", child


_MODULE_INTERNALS = frozenset(vars(nn.Module()))


@functools.lru_cache(maxsize=1024)
def _names_of(code: types.CodeType, without: frozenset[types.CodeType]) -> tuple[set[str], set[str]]:
    """Returns the global names, and the names of closures, that a code uses itself or in functions inside it."""
    global_names = set(code.co_names)
    closed_names = {str(item.argval) for item in dis.get_instructions(code) if item.opname.endswith("_DEREF")}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType) and constant not in without:
            inner_global, inner_closed = _names_of(constant, without)
            global_names |= inner_global
            closed_names |= inner_closed
    return global_names, closed_names


@functools.lru_cache(maxsize=1024)
def _names_of_class(kind: type) -> frozenset[str]:
    """Returns the names that the methods of a module's class use."""
    functions = [value for base in kind.__mro__ if base not in (nn.Module, object) for value in vars(base).values()
                 if isinstance(value, types.FunctionType) and value.__name__ not in ("__init__", "extra_repr")]
    return frozenset().union(*(_names_of(function.__code__, frozenset())[0] for function in functions))


@functools.lru_cache(maxsize=1024)
def _names_by_methods(code: types.CodeType, owner: type, without: frozenset[types.CodeType]) -> frozenset[str]:
    """Returns the names that a method uses, also in the methods of its class that it calls, and in its properties."""
    names: set[str] = set()
    codes, seen = [code], {code}
    while codes:
        code = codes.pop()
        names |= _names_of(code, without)[0]
        for name, is_called in _attributes_of(code, without):
            found = inspect.getattr_static(owner, name, None)
            if isinstance(found, property):
                found = found.fget
            elif not is_called:  # it may be a host function of another mode
                continue
            found = getattr(found, "__func__", found)
            if isinstance(found, types.FunctionType) and found.__code__ not in seen | without:
                seen.add(found.__code__)
                codes.append(found.__code__)
    return frozenset(names)


def _attributes_of(code: types.CodeType, without: frozenset[types.CodeType]) -> Iterator[tuple[str, bool]]:
    """Yields the names of attributes that a code reads itself or in functions inside it, and whether it calls them."""
    for item in dis.get_instructions(code):
        if item.opname == "LOAD_METHOD":  # up to Python 3.11
            yield item.argval, True
        elif item.opname == "LOAD_ATTR":
            yield item.argval, sys.version_info >= (3, 12) and bool((item.arg or 0) & 1)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType) and constant not in without:
            yield from _attributes_of(constant, without)


def _is_library(value: Any) -> bool:
    module = getattr(value, "__module__", None) or ""
    return module == "builtins" or module.split(".")[0] in _STANDARD or module.startswith(_LIBRARIES)


_STANDARD = frozenset({"collections", "functools", "itertools", "io", "os", "pathlib", "logging", "threading", "queue",
                       "re", "contextlib", "weakref", "abc", "typing", "enum", "unittest", "_pytest"})


def _slot_names(kind: type) -> list[str]:
    return [name for base in kind.__mro__ for name in _as_tuple(getattr(base, "__slots__", ()))
            if not name.startswith("__")]


def _as_tuple(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
