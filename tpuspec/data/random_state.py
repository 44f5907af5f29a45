"""The random state of this process that an input may draw from: Python's, numpy's and torch's."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ProcessRandomState:
    """A moment's state.

    Attributes:
      python: of random.getstate.
      numpy: of numpy.random.get_state.
      torch: of torch.get_rng_state.
    """

    python: Any
    numpy: Any
    torch: Tensor

    @classmethod
    def take(cls) -> Self:
        """Returns the state as it is now."""
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ProcessRandomState):
            return NotImplemented
        name, keys, *rest = self.numpy
        other_name, other_keys, *other_rest = other.numpy
        return (self.python == other.python and (name, rest) == (other_name, other_rest)
                and np.array_equal(keys, other_keys) and torch.equal(self.torch, other.torch))


@contextlib.contextmanager
def keeping_random_state() -> Iterator[None]:
    """Puts the state back at the end of the block."""
    own = ProcessRandomState.take()
    try:
        yield
    finally:
        random.setstate(own.python)
        np.random.set_state(own.numpy)
        torch.set_rng_state(own.torch)
