"""Calls of the Trainer are watched: one that does not move is ended, and errors are told to the other hosts."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from tpuspec.loops.watchdog import Watchdog
from tpuspec.spec.phase import in_phase

P = ParamSpec("P")
R = TypeVar("R")


class Reporter(Protocol):
    """Whose methods are watched."""

    def _watchdog(self) -> Watchdog:
        """Returns what watches one call."""
        ...

    def _report(self, error: BaseException, phase: str) -> None:
        """Tells the other hosts of an error that ends this one's call."""


S = TypeVar("S", bound=Reporter)


def watched(verb: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Ends a method that does not move, and tells the other hosts of every error that leaves it."""
    @functools.wraps(verb)
    def run(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with self._watchdog(), in_phase(verb.__name__):
                return verb(self, *args, **kwargs)
        except BaseException as error:
            self._report(error, verb.__name__)
            raise

    return run


def watched_generator(verb: Callable[Concatenate[S, P], Generator[R, None, None]],
                      ) -> Callable[Concatenate[S, P], Generator[R, None, None]]:
    """The same of a generator; that its user closes it is no error, nor is what its user does in between."""
    @functools.wraps(verb)
    def run(self: S, /, *args: P.args, **kwargs: P.kwargs) -> Generator[R, None, None]:
        try:
            with self._watchdog() as watchdog, contextlib.closing(verb(self, *args, **kwargs)) as values:
                for value in values:
                    watchdog.pause()
                    yield value
                    watchdog.resume()
        except GeneratorExit:
            raise
        except BaseException as error:
            self._report(error, verb.__name__)
            raise

    return run
