"""What several hosts decide together: the end of input, stops, saves, results; the loops ask it of one protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Coordinator(Protocol):
    """The hosts of one run.

    Every method is called by all of them, in the same order, but for the properties, `report`, `any_failed`, `post` and
    `read_post`, which any thread may call.

    Attributes:
      num_hosts: processes that compute together.
      host_index: this one among them.
      is_chief: whether it is the first, which writes checkpoints, summaries and progress.
    """

    @property
    def num_hosts(self) -> int: ...

    @property
    def host_index(self) -> int: ...

    @property
    def is_chief(self) -> bool: ...

    def exchange(self, value: Any, *, name: str) -> list[Any]:
        """Returns every host's value, in host order.

        Args:
          value: small, of JSON's types.
          name: of the question; hosts that ask different ones at once have parted, which is an error.

        Raises:
          HostFailureError: another host failed, or asks something else.
        """
        ...

    def agree(self, flag: bool, *, name: str) -> bool:
        """Returns whether any host says yes."""
        ...

    def barrier(self, name: str, timeout_seconds: float) -> None:
        """Returns when every host is here.

        Raises:
          HostFailureError: another host failed, or some are not here in time; names them.
        """
        ...

    def any_failed(self) -> bool:
        """Whether a host of the run has failed; asks nobody."""
        ...

    def report(self, error: BaseException, phase: str) -> None:
        """Tells the others that this host fails, unless it fails because another did; they end then."""
        ...

    def post(self, name: str, text: str) -> None:
        """Leaves a text for the others, under a name of its own; waits for nobody."""
        ...

    def read_post(self, name: str, *, remove: bool = False) -> str | None:
        """Returns the text that somebody left, None so far; waits for nobody.

        Raises:
          HostFailureError: the host that keeps them is gone.
        """
        ...

    def share(self, tree: T) -> T:
        """Returns the chief's tree on every host.

        Args:
          tree: nested dicts, lists, tuples and namedtuples of tensors, arrays and plain values; that of the others is
            not read.
        """
        ...

    def collect(self, tree: T) -> list[T] | None:
        """Returns every host's tree on the chief, in host order; None on the others.

        Args:
          tree: as in `share`; its tensors have the same shapes and dtypes on every host.
        """
        ...

    def deal(self, trees: Sequence[T] | None) -> T:
        """Returns the tree that the chief has for this host.

        Args:
          trees: on the chief one for each host, of equal nesting, shapes and dtypes; None on the others.
        """
        ...
