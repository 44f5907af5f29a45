"""Errors that leave a call of the Trainer are told to the other hosts, which cannot go on without this one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from tpuspec.spec.phase import in_phase

P = ParamSpec("P")
R = TypeVar("R")


class Reporter(Protocol):
    """Whose methods are watched."""

    def _report(self, error: BaseException, phase: str) -> None:
        """Tells the other hosts of an error that ends this one's call."""


S = TypeVar("S", bound=Reporter)


def watched(verb: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Tells the other hosts of every error that leaves a method."""
    @functools.wraps(verb)
    def run(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with in_phase(verb.__name__):
                return verb(self, *args, **kwargs)
        except BaseException as error:
            self._report(error, verb.__name__)
            raise

    return run


def watched_generator(verb: Callable[Concatenate[S, P], Generator[R, None, None]],
                      ) -> Callable[Concatenate[S, P], Generator[R, None, None]]:
    """The same of a generator; that its user closes it is no error."""
    @functools.wraps(verb)
    def run(self: S, /, *args: P.args, **kwargs: P.kwargs) -> Generator[R, None, None]:
        try:
            yield from verb(self, *args, **kwargs)
        except GeneratorExit:
            raise
        except BaseException as error:
            self._report(error, verb.__name__)
            raise

    return run
