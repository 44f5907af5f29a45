"""What Python code ran while a step was traced, as the interpreter tells of it: the user's functions and their objects.

Nothing is guessed from source or names: a profile function of this thread sees every call. What it sees is looked at
before and after later traces (`python_state.py`), as a replayed step runs no Python code.
"""

from __future__ import annotations

import collections
import datetime
import dis
import functools
import gc
import inspect
import os
import random
import secrets
import sys
import sysconfig
import time
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CLOCKS = frozenset(getattr(time, name) for name in (
    "time", "time_ns", "perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "process_time",
    "process_time_ns", "localtime", "gmtime", "ctime", "strftime"))
_DATES = frozenset({"now", "utcnow", "today"})
_OUTSIDE = {**dict.fromkeys(_CLOCKS, "the clock"), os.urandom: "random numbers of the system",
            secrets.token_bytes: "random numbers of the system", open: "a file", input: "a line of the terminal"}
_LIBRARIES = ("torch", "torch_xla", "jax", "jaxlib", "torchmetrics", "numpy", "hydra", "omegaconf", "tensorboard",
              "_pytest", "pluggy", "hypothesis")
_MAX_OBJECTS = 5000


@functools.lru_cache(maxsize=1)
def _library_folders() -> tuple[str, ...]:
    site = Path(torch.__file__).parents[1]
    return (*(f"{site / name}{os.sep}" for name in _LIBRARIES), f"{Path(__file__).parents[1]}{os.sep}")


@functools.lru_cache(maxsize=4096)
def is_library_file(path: str) -> bool:
    """Whether code of a file is Python's, torch's or tpuspec's own, which remembers nothing that a step depends on."""
    if path.startswith(_library_folders()) or path.startswith("<frozen"):
        return not path.startswith(os.path.join(_library_folders()[-1], "testing"))
    standard = sysconfig.get_path("stdlib") + os.sep
    return path.startswith(standard) and "site-packages" not in path


class Frames:
    """Notes which functions of the user's run in this thread while it is a context, and on what objects.

    Attributes:
      codes: code objects that ran -> the globals that they read.
      outside: what the step reads from outside the process, and where; None for nothing.
    """

    def __init__(self) -> None:
        self.codes: dict[types.CodeType, dict[str, Any]] = {}
        self.outside: str | None = None
        self._is_user: dict[types.CodeType, bool] = {}
        self._objects: dict[int, tuple[str, Callable[[], Any]]] = {}
        self._num_named: collections.Counter[str] = collections.Counter()
        self._begun: set[int] = set()
        self._before: Any = None

    def __enter__(self) -> Frames:
        self.outside = None
        self._begun.clear()
        self._before = sys.getprofile()
        sys.setprofile(self._see)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is None or callable(self._before):
            sys.setprofile(self._before)
        else:  # cProfile's, which is written in C: setprofile takes functions only
            sys.setprofile(None)
            self._before.enable()
        self._drop_temporary()

    def objects(self) -> Iterator[tuple[str, Any]]:
        """Yields what the functions were called on, with a name for people, as far as it is still there."""
        for path, held in list(self._objects.values()):
            if (value := held()) is not None:
                yield path, value

    def _see(self, frame: types.FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        is_user = self._is_user.get(code)
        if is_user is None:
            # A dataclass writes its own functions.
            is_user = self._is_user[code] = not (
                is_library_file(code.co_filename) or code.co_qualname.startswith("__create_fn__")
                or any(getattr(callback, "__code__", None) is code for callback in gc.callbacks))
        if not is_user:
            return
        if event == "call":
            if code.co_flags & inspect.CO_GENERATOR:
                self._see_generator(frame)
            self.codes[code] = frame.f_globals
            if len(self._objects) < _MAX_OBJECTS:
                self._keep_arguments(code, frame)
        elif event == "c_call" and self.outside is None:
            what = _outside(argument)
            if what is not None:
                self.outside = f"{what} at {Path(code.co_filename).name}:{frame.f_lineno}"

    def _see_generator(self, frame: types.FrameType) -> None:
        if _is_begun(frame):
            if id(frame) not in self._begun and self.outside is None:
                self.outside = (f"the next item of a generator that is older than the step, "
                                f"{frame.f_code.co_qualname}, at {_place(frame.f_back)}")
        else:
            self._begun.add(id(frame))

    def _keep_arguments(self, code: types.CodeType, frame: types.FrameType) -> None:
        values = frame.f_locals
        num = code.co_argcount + code.co_kwonlyargcount
        for name in code.co_varnames[:num]:
            value = values.get(name)
            if value is None or isinstance(value, (Tensor, *_PLAIN)):
                continue
            known = self._objects.get(id(value))
            if known is not None and known[1]() is value:
                continue
            path = name if name != "self" else f"self of {code.co_qualname}"
            # An object's name is its own for as long as it lives.
            self._num_named[path] += 1
            if self._num_named[path] > 1:
                path = f"{path} ({self._num_named[path]})"
            try:
                self._objects[id(value)] = (path, weakref.ref(value))
            except TypeError:  # a list, a dict
                self._objects[id(value)] = (path, functools.partial(_identity, value))

    def _drop_temporary(self) -> None:
        """Lets go of what only the trace needed: tensors within would seem to be left behind."""
        for key, (_, held) in list(self._objects.items()):
            if isinstance(held, weakref.ref):
                if held() is None:
                    del self._objects[key]
            elif sys.getrefcount(held.args[0]) <= 2 or _holds_tensors(held.args[0]):  # type: ignore[attr-defined]
                del self._objects[key]


_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, types.ModuleType, np.generic)


def _identity(value: Any) -> Any:
    return value


def _holds_tensors(value: Any) -> bool:
    items = value.values() if type(value) is dict else value if isinstance(value, (list, tuple)) else ()
    return any(isinstance(item, Tensor) for item, _ in zip(items, range(8), strict=False))


def _is_begun(frame: types.FrameType) -> bool:
    """Whether a generator has yielded before."""
    return frame.f_lasti > _first_instruction(frame.f_code)


@functools.lru_cache(maxsize=256)
def _first_instruction(code: types.CodeType) -> int:
    return next((item.offset for item in dis.get_instructions(code) if item.opname == "RESUME"), 0)


def _outside(function: Any) -> str | None:
    try:
        what = _OUTSIDE.get(function)
    except TypeError:  # not hashable
        return None
    if what is None and getattr(function, "__name__", "") in _DATES and isinstance(
            owner := getattr(function, "__self__", None), type) and issubclass(owner, datetime.date):
        return "the clock"
    if what is None and isinstance(getattr(function, "__self__", None), random.SystemRandom):
        return "random numbers of the system"
    return what


def _place(frame: types.FrameType | None) -> str:
    return "a place in C" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
