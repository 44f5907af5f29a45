"""What a step's Python code could remember from one call to the next, as values that can be compared.

A captured step does not run its Python code, so a model_fn that counts, appends or draws random numbers on the host
cannot be replayed. `Memory` knows from `frames.py` which functions ran in a trace, and on what objects. It takes
snapshots of those: their globals, closures, defaults and attributes, the attributes of modules and optimizers, random
state. Large data is compared by identity and length, never read through.
"""

from __future__ import annotations

import builtins
import collections
import contextvars
import dataclasses
import dis
import enum
import functools
import gc
import hashlib
import itertools
import logging
import os
import random
import types
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tpuspec.spec.backend import Replica
from tpuspec.tracer.frames import Frames, is_library_file
from tpuspec.tracer.optimizer_places import is_number

Snapshot = dict[str, Any]
"""Path of a value -> what it is compared by."""

_RANDOM = ("Python's random numbers, random", "numpy's random numbers, np.random", "torch's random numbers on the host")
_MAX_DEPTH = 8
_MAX_ITEMS = 128
_MAX_VALUES = 50_000
_MAX_BYTES_READ = 1 << 16
_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, range, slice,
           np.generic)
_CONTAINERS = (dict, list, tuple, collections.deque, collections.OrderedDict, collections.defaultdict,
               collections.Counter, types.MappingProxyType, nn.modules.module.OrderedDict)
_WHOLE = frozenset({"__dict__", "vars", "asdict", "astuple", "attrgetter"})
_MODULE_INTERNALS = frozenset(vars(nn.Module())) - {
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"}
_OPTIMIZER_INTERNALS = frozenset({"param_groups", "state", "defaults"})


class Memory:
    """What the Python code of one step may remember.

    Args:
      step: the step; a trace of it is made within `watching`.
      replica: its module and optimizers are looked at too.
    """

    def __init__(self, step: Callable[..., Any], replica: Replica) -> None:
        self._step, self._replica = step, replica
        self._frames = Frames()
        self._functions: dict[types.CodeType, weakref.ref[types.FunctionType]] = {}
        self._sought: set[types.CodeType] = set()

    def watching(self) -> Frames:
        """Notes, as a context, the functions that run in a trace and what they are called on."""
        return self._frames

    def outside(self) -> str | None:
        """Says what the newest watched trace has read from outside the process; None for nothing."""
        return self._frames.outside

    def settings(self) -> Snapshot:
        """Returns what may not change between two steps of a loop, where nothing looks."""
        return self._walk(with_filled=False)

    def all(self) -> Snapshot:
        """Returns all that the step could change: its settings, the optimizers' numbers, random state."""
        self._sought.clear()
        snapshot = self._walk() | _optimizer_numbers(self._replica)
        snapshot[_RANDOM[0]] = _digest(repr(random.getstate()).encode())
        snapshot[_RANDOM[1]] = _digest(repr(np.random.get_state(legacy=False)).encode())
        snapshot[_RANDOM[2]] = _digest(torch.get_rng_state().numpy().tobytes())
        return snapshot

    def _walk(self, *, with_filled: bool = True) -> Snapshot:
        codes = self._frames.codes
        used = _names_of_codes(codes.keys())
        walk = _Walk(codes, None if used & _WHOLE else used,
                     frozenset() if with_filled else _handed_on(frozenset(codes)))
        walk.visit("", self._step, 0)
        for path, value in self._frames.objects():
            walk.visit(path, value, 1)
        for function in self._functions_of(codes, walk.seen):
            walk.visit("", function, 0)
        replica = self._replica
        if replica.model is not None:
            walk.visit("model", replica.model, 0)
            for path, parameter in replica.model.named_parameters():
                if hooks := getattr(parameter, "_backward_hooks", None):
                    walk.visit(f"hooks of {path}", hooks, 1)
        for name, optimizer in replica.optimizers.items():
            walk.visit(f"optimizer {name!r}" if name else "optimizer", optimizer, 0)
        if {"environ", "getenv"} & used:
            walk.snapshot["os.environ"] = dict(os.environ)
        return walk.snapshot

    def _functions_of(self, codes: Mapping[types.CodeType, Any], seen: set[int]) -> Iterator[types.FunctionType]:
        """Yields functions that ran and that the walk has not met: their closures and defaults may have changed.

        What no object holds after a watched trace is sought again only in the next one: it takes a look at all objects.
        """
        missing = [code for code in codes if id(code) not in seen and code not in self._functions
                   and code not in self._sought and (code.co_freevars or code.co_names)]
        self._sought.update(missing)
        if missing:
            # Not gc.get_objects, with which a thread that just makes a tuple would fail.
            for function in gc.get_referrers(*missing):
                if type(function) is types.FunctionType:
                    self._functions[function.__code__] = weakref.ref(function)
        for code, reference in self._functions.items():
            if id(code) not in seen and (function := reference()) is not None:
                yield function


def changed(before: Snapshot, after: Snapshot) -> list[str]:
    """Names what differs between two snapshots, old and new, as far as both have it."""
    return [f"{path} ({_short(before[path])} -> {_short(after[path])})"
            for path in after if path in before and before[path] != after[path]]


def _optimizer_numbers(replica: Replica) -> Snapshot:
    snapshot: Snapshot = {}
    for name, optimizer in replica.optimizers.items():
        path = f"optimizer {name!r}" if name else "optimizer"
        for number, group in enumerate(optimizer.param_groups):
            for key, value in group.items():
                if key != "params" and not isinstance(value, Tensor) and not is_number(value):
                    snapshot[f"{path} {key} of group {number}"] = repr(value)
        for index, state in enumerate(optimizer.state.values()):
            for key, value in (state.items() if isinstance(state, Mapping) else [("", state)]):
                if is_number(value):
                    continue
                if not isinstance(value, Tensor):
                    snapshot[f"{path} state {index} {key}"] = repr(value) if isinstance(value, _SIMPLE) else id(value)
                elif value.device.type == "cpu":
                    snapshot[f"{path} state {index} {key}"] = (id(value), value._version)
    return snapshot


def _short(value: Any) -> str:
    text = value.told if isinstance(value, _Opaque) else str(value[1] if _is_simple_entry(value) else value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _is_simple_entry(value: Any) -> bool:
    return type(value) is tuple and len(value) == 2 and isinstance(value[0], type)


@dataclasses.dataclass(frozen=True, slots=True)
class _Opaque:
    """A value compared by something that says nothing to people.

    Attributes:
      key: compared.
      told: what people are told.
    """

    key: Any
    told: str


def _digest(data: bytes, told: str = "a state") -> _Opaque:
    return _Opaque(hashlib.blake2b(data, digest_size=8).digest(), told)


class _Walk:
    """Visits values by path, each object once.

    Args:
      codes: of functions that ran, with their globals; the insides of other functions are passed over.
      names: of attributes of the user's objects that are visited; None for all.
      handed_on: names of globals and closures that are passed over.

    Attributes:
      snapshot: what was found.
      seen: ids of what was visited, code objects of functions among them.
    """

    def __init__(self, codes: Mapping[types.CodeType, dict[str, Any]], names: frozenset[str] | None,
                 handed_on: frozenset[str]) -> None:
        self.snapshot: Snapshot = {}
        self.seen: set[int] = set()
        self._codes, self._names, self._handed_on = codes, names, handed_on
        self._globals: set[tuple[int, str]] = set()

    def visit(self, path: str, value: Any, depth: int) -> None:
        if isinstance(value, (enum.Enum, *_SIMPLE)):
            self._note(path, (type(value), repr(value) if isinstance(value, float) else value))
            return
        if isinstance(value, Tensor):
            told = f"tensor {list(value.shape)} on {value.device}"
            # A device tensor by its object: what it stands for now is no value of Python's.
            is_host = value.device.type == "cpu"
            self._note(path, _Opaque((id(value), value._version if is_host else None), told))
            return
        if id(value) in self.seen or depth > _MAX_DEPTH or len(self.snapshot) > _MAX_VALUES:
            return
        self.seen.add(id(value))
        for name, item in self._parts(path, value):
            self.visit(name, item, depth + 1)

    def _note(self, path: str, value: Any) -> None:
        while path in self.snapshot:  # of another function or object of that name
            path += "'"
        self.snapshot[path] = value

    def _parts(self, path: str, value: Any) -> Iterable[tuple[str, Any]]:
        if isinstance(value, types.FunctionType):
            return self._function(path, value)
        if isinstance(value, types.MethodType):
            return [(path, value.__func__), (f"{path} self".strip(), value.__self__)]
        if isinstance(value, functools.partial):
            return [(path, value.func), (f"{path} arguments".strip(), (value.args, value.keywords))]
        if isinstance(value, types.BuiltinFunctionType):
            self._note(path, _Opaque((value.__name__, id(value.__self__)), value.__name__))
            return [] if isinstance(value.__self__, types.ModuleType | None) else [(f"{path} self", value.__self__)]
        if isinstance(value, nn.Module):
            return self._module(path, value)
        if isinstance(value, type):
            return self._class(path, value)
        if isinstance(value, types.ModuleType):
            return [] if _is_library(value.__name__) else self._attributes(path, vars(value), used_only=True)
        if isinstance(value, torch.optim.Optimizer):
            return [(name, item) for name, item in self._attributes(
                path, vars(value), without=_OPTIMIZER_INTERNALS) if not is_number(item)]  # which a plan follows
        if isinstance(value, contextvars.ContextVar):
            return [(f"{path}.get()", value.get(None))]
        if type(value) in _CONTAINERS or (isinstance(value, tuple) and hasattr(value, "_fields")):
            return self._items(path, value)
        if isinstance(value, set | frozenset):
            items = frozenset(map(repr, value)) if len(value) <= _MAX_ITEMS else None
            self._note(path, _Opaque((len(value), items), f"a set of {len(value)}"))
            return []
        return self._state(path, value)

    def _state(self, path: str, value: Any) -> Iterable[tuple[str, Any]]:
        """Objects whose state their type tells, and those of the user's classes."""
        if isinstance(value, np.ndarray):
            self._note(path, _array(value))
        elif isinstance(value, np.random.Generator | np.random.BitGenerator):
            state = value.bit_generator.state if isinstance(value, np.random.Generator) else value.state
            self._note(path, _digest(repr(state).encode()))
        elif isinstance(value, np.random.RandomState):
            self._note(path, _digest(repr(value.get_state(legacy=False)).encode()))
        elif isinstance(value, random.Random):
            self._note(path, _digest(repr(value.getstate()).encode()))
        elif isinstance(value, torch.Generator):
            self._note(path, _digest(value.get_state().numpy().tobytes()))
        elif isinstance(value, logging.Logger):  # not its manager, to which every import adds
            self._note(path, _Opaque((id(value), value.getEffectiveLevel(), value.disabled),
                                     f"logger of level {value.getEffectiveLevel()}"))
        elif isinstance(value, types.GeneratorType):
            frame = value.gi_frame
            self._note(path, (frame is None, frame and frame.f_lasti))
            return [] if frame is None else self._attributes(path, frame.f_locals)
        elif hasattr(type(value), "__next__") and type(value).__module__ in ("builtins", "itertools"):
            return [(f"{path} (iterator)", _reduced(value))]
        else:
            return self._object(path, value)
        return []

    def _object(self, path: str, value: Any) -> Iterator[tuple[str, Any]]:
        kind = type(value)
        if kind.__module__.startswith("tpuspec.") and not dataclasses.is_dataclass(kind):
            return  # of the runtime
        names = None if _is_library(kind.__module__) else self._names
        held = getattr(value, "__dict__", None)
        yield from self._attributes(path, held if type(held) is dict else {}, names=names)
        for name in _slot_names(kind):
            if (names is None or name in names) and hasattr(value, name):
                yield f"{path}.{name}", getattr(value, name)
        if isinstance(value, dict | list):  # a subclass with ways of its own
            size = dict.__len__(value) if isinstance(value, dict) else list.__len__(value)
            self._note(f"number of items in {path}", size)
        if not _is_library(kind.__module__):
            yield f"{path}'s class", kind

    def _attributes(self, path: str, values: Mapping[str, Any], *, names: frozenset[str] | None = None,
                    without: frozenset[str] = frozenset(), used_only: bool = False) -> Iterator[tuple[str, Any]]:
        wanted = self._used() if used_only else names
        for name, item in list(values.items()):
            if name not in without and (wanted is None or name in wanted):
                yield f"{path}.{name}" if path else name, item

    def _used(self) -> frozenset[str]:
        return _names_of_codes(self._codes.keys())

    def _class(self, path: str, kind: type) -> Iterator[tuple[str, Any]]:
        if _is_library(kind.__module__):
            self._note(path, _Opaque(id(kind), kind.__name__))
            return
        for base in kind.__mro__:
            if not _is_library(base.__module__):
                for name, item in self._attributes(f"{base.__qualname__}", vars(base), used_only=True):
                    # A method that was put in place of another.
                    found = item.fget if isinstance(item, property) else getattr(item, "__func__", item)
                    if not isinstance(found, types.FunctionType) or found.__code__ in self._codes:
                        yield name, found

    def _items(self, path: str, container: Any) -> Iterator[tuple[str, Any]]:
        size = len(container)
        self._note(f"number of items in {path}", size)
        items = container.items() if isinstance(container, Mapping) else enumerate(container)
        if size <= _MAX_ITEMS:
            for key, item in list(items):
                yield f"{path}[{key!r}]" if isinstance(key, str | int) else f"{path}[{type(key).__name__}]", item
        elif isinstance(container, Mapping):
            for key, item in itertools.islice(items, _MAX_ITEMS // 2):
                yield f"{path}[{key!r}]" if isinstance(key, str | int) else f"{path}[{type(key).__name__}]", item
        else:
            for place in (*range(_MAX_ITEMS // 2), *range(size - _MAX_ITEMS // 2, size)):
                yield f"{path}[{place}]", container[place]

    def _function(self, path: str, function: types.FunctionType) -> Iterator[tuple[str, Any]]:
        code = function.__code__
        name = function.__qualname__
        self._note(f"the function {path}", _Opaque(code, name))
        if is_library_file(code.co_filename) and code not in self._codes:
            return
        for key, value in vars(function).items():
            if key != "__wrapped__":
                yield f"{name}.{key}", value
        if isinstance(wrapped := vars(function).get("__wrapped__"), types.FunctionType):
            yield name, wrapped
        if code not in self._codes and path:
            return  # named, but not run: by another function alone
        self.seen.add(id(code))
        names = _names_of(code)
        for free, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            if free not in names or (free in self._handed_on):
                continue  # of a function inside, which is looked at if it ran
            try:
                yield f"{free} of {name}", cell.cell_contents
            except ValueError:  # not assigned yet
                continue
        for key, value in (function.__kwdefaults__ or {}).items():
            yield f"default {key} of {name}", value
        for i, value in enumerate(function.__defaults__ or ()):
            yield f"default {i} of {name}", value
        for key in names:
            place = (id(function.__globals__), key)
            if (key in function.__globals__ and not hasattr(builtins, key) and place not in self._globals
                    and key not in self._handed_on):
                self._globals.add(place)
                yield key, function.__globals__[key]

    def _module(self, path: str, module: nn.Module) -> Iterator[tuple[str, Any]]:
        self._note(f"the class of {path}", _Opaque(type(module), type(module).__name__))
        for name, value in self._attributes(path, vars(module), without=_MODULE_INTERNALS):
            if not isinstance(value, Tensor) or value.device.type == "cpu":  # else it is state: a slot
                yield name, value
        for name, child in module._modules.items():
            if child is not None:
                yield f"{path}.{name}", child
        if not _is_library(type(module).__module__):
            yield f"{path}'s class", type(module)


def _array(array: np.ndarray) -> _Opaque:
    told = f"array {list(array.shape)}"
    if array.dtype.hasobject:
        return _Opaque(id(array), told)
    if array.nbytes <= _MAX_BYTES_READ:
        return _digest(array.tobytes(), told)
    sample = array.flat[::max(1, array.size // 1024)]
    return _Opaque((id(array), array.shape, hashlib.blake2b(sample.tobytes(), digest_size=8).digest()), told)


def _reduced(iterator: Any) -> Any:
    """Returns what an iterator of Python's own would be made again from: what is left, and where it stands."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return iterator.__reduce__()[1:]
        except (TypeError, AttributeError):
            return repr(iterator)


@functools.lru_cache(maxsize=4096)
def _names_of(code: types.CodeType) -> tuple[str, ...]:
    """Returns the names of globals and closures that a code reads or writes itself."""
    return tuple(sorted({str(item.argval) for item in dis.get_instructions(code) if item.opname in _READ | _WRITTEN}))


_READ = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF",
                   "LOAD_FROM_DICT_OR_GLOBALS"})
_WRITTEN = frozenset({"STORE_GLOBAL", "STORE_NAME", "STORE_DEREF", "DELETE_GLOBAL", "DELETE_DEREF"})
_FILLS = frozenset({"append", "extend", "add", "update", "appendleft", "put"})


@functools.lru_cache(maxsize=64)
def _handed_on(codes: frozenset[types.CodeType]) -> frozenset[str]:
    """Returns the names that codes read for nothing but a method that fills them, as in host_call=(losses.append, ...).

    What is in them is no concern of the step, unless it fills them itself.
    """
    filled: set[str] = set()
    read: set[str] = set()
    for code in codes:
        instructions = list(dis.get_instructions(code))
        for item, following in zip(instructions, [*instructions[1:], None], strict=True):
            if item.opname in _READ | _WRITTEN:
                fills = (following is not None and following.opname in ("LOAD_ATTR", "LOAD_METHOD")
                         and following.argval in _FILLS)
                (filled if fills and item.opname in _READ else read).add(str(item.argval))
    return frozenset(filled - read)


def _names_of_codes(codes: Iterable[types.CodeType]) -> frozenset[str]:
    return _names_of_all(frozenset(codes))


@functools.lru_cache(maxsize=64)
def _names_of_all(codes: frozenset[types.CodeType]) -> frozenset[str]:
    """Returns every name that codes may read an attribute by, text constants for getattr among them."""
    names: set[str] = set()
    for code in codes:
        names.update(code.co_names)
        names.update(item for item in code.co_consts if isinstance(item, str) and item.isidentifier())
    return frozenset(names)


@functools.lru_cache(maxsize=4096)
def _is_library(module: str | None) -> bool:
    if not isinstance(module, str):
        return False
    top = module.split(".")[0]
    return (module.startswith("tpuspec.") and not module.startswith("tpuspec.testing")) or top in _LIBRARY_MODULES


_LIBRARY_MODULES = frozenset({"builtins", "torch", "torch_xla", "jax", "jaxlib", "torchmetrics", "numpy", "tensorboard",
                              "hydra", "collections", "functools", "itertools", "io", "os", "pathlib", "logging",
                              "threading", "queue", "re", "contextlib", "weakref", "abc", "typing", "enum", "unittest",
                              "_pytest", "_thread", "_io", "datetime", "inspect", "dataclasses"})


@functools.lru_cache(maxsize=1024)
def _slot_names(kind: type) -> tuple[str, ...]:
    return tuple(name for base in kind.__mro__ for name in _as_tuple(vars(base).get("__slots__", ()))
                 if not name.startswith("__"))


def _as_tuple(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
