"""The coordinator of a run on one host: every answer is its own, and costs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class Alone:
    """See `tpuspec.spec.coordinator.Coordinator`."""

    num_hosts = 1
    host_index = 0
    is_chief = True

    def exchange(self, value: Any, *, name: str) -> list[Any]:
        """Returns the one value."""
        return [value]

    def agree(self, flag: bool, *, name: str) -> bool:
        """Returns the flag."""
        return flag

    def barrier(self, name: str, timeout_seconds: float) -> None:
        """Returns at once."""

    def any_failed(self) -> bool:
        """Nobody else can fail."""
        return False

    def report(self, error: BaseException, phase: str) -> None:
        """There is nobody to tell."""

    def post(self, name: str, text: str) -> None:
        """There is nobody to read it."""

    def read_post(self, name: str, *, remove: bool = False) -> str | None:
        """Nobody leaves anything."""
        return None

    def share(self, tree: T) -> T:
        """Returns the tree."""
        return tree

    def collect(self, tree: T) -> list[T] | None:
        """Returns the one tree."""
        return [tree]

    def deal(self, trees: Sequence[T] | None) -> T:
        """Returns the one tree."""
        assert trees is not None, "the only host is the chief"
        return trees[0]
