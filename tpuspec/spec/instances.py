"""The live instances of a class, found while other threads go on."""

from __future__ import annotations

import gc
from typing import TypeVar

T = TypeVar("T")


def instances_of(cls: type[T]) -> list[T]:
    """Returns the live instances of a class and its subclasses, as far as Python's garbage collector knows them.

    Every instance refers to its class. With gc.get_objects a thread that just makes a tuple would find another
    reference to it, and fail with `SystemError: bad argument to internal function`.
    """
    kinds, new = {cls}, {cls}
    while new:
        new = {sub for kind in new for sub in type.__subclasses__(kind)} - kinds
        kinds |= new
    return [item for item in gc.get_referrers(*kinds) if type(item) in kinds]
