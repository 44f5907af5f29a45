"""One save by several processes: each writes its own files, and the chief commits when all are there."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from tpuspec.checkpoint.index import Part
from tpuspec.errors import CheckpointError
from tpuspec.spec.coordinator import Coordinator
from tpuspec.spec.pieces import Pieces, whole

_POLL_SECONDS = 0.01
_LAST_SECONDS = 3.0
"""For a save under way when another process has failed: what that one still writes counts."""
_numbers = itertools.count()


class JointSave:
    """What the processes tell one another during a save, from whatever thread it runs on.

    The chief names a place, the others write their files there and say what they wrote, or what went wrong; the chief
    may name another place then. In the end it says whether the checkpoint is committed. Every process makes its
    `JointSave` in the loop's thread, where all of them save in the same order.

    Args:
      coordinator: of the processes.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._name = f"save/{next(_numbers)}"
        self._attempt = 0
        self.leads, self.number = coordinator.is_chief, coordinator.host_index

    def begin(self, place: str) -> None:
        """On the chief: names where the others are to write."""
        self._attempt += 1
        self._post("place", place)

    def gather(self) -> list[Part]:
        """On the chief: waits until the others have written, and returns what.

        Raises:
          OSError: one of them could not write; with its errno.
          CheckpointError: one of them has failed.
        """
        answers = [json.loads(self._wait(f"{self._attempt}/{host}", remove=True))
                   for host in range(1, self._coordinator.num_hosts)]
        for host, answer in enumerate(answers, start=1):
            if "error" in answer:
                raise OSError(answer["errno"], f"process {host}: {answer['error']}") if answer["errno"] else (
                    CheckpointError(f"process {host} could not write its part: {answer['error']}"))
        return [Part.decode(answer["part"]) for answer in answers]

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """On the chief: says at the end of the block that the checkpoint is committed, or what went wrong."""
        try:
            yield
        except BaseException as error:
            self._coordinator.post(f"{self._name}/end", str(error) or type(error).__name__)
            raise
        self._coordinator.post(f"{self._name}/end", "")

    def own_pieces(self, tensors: Mapping[str, Tensor | Pieces]) -> dict[str, Pieces]:
        """Returns what this process writes: its pieces, and on the chief the tensors that all have."""
        return {name: value if isinstance(value, Pieces) else whole(value)
                for name, value in tensors.items() if self.leads or isinstance(value, Pieces)}

    def follow(self, write: Callable[[str], Part]) -> None:
        """On the others: writes wherever the chief says, until it has committed.

        Args:
          write: writes this process's files at a place.

        Raises:
          CheckpointError: the checkpoint could not be committed.
        """
        own: Exception | None = None
        while True:
            self._attempt += 1
            name, text = self._wait_any(f"{self._attempt}/place", "end")
            if name == "end":
                if text:
                    raise CheckpointError(text) from own
                return
            try:
                answer = {"part": write(text).encode()}
            except Exception as error:
                own = error
                answer = {"errno": getattr(error, "errno", None), "error": f"{type(error).__name__}: {error}"}
            self._post(str(self.number), json.dumps(answer))

    def _post(self, name: str, text: str) -> None:
        self._coordinator.post(f"{self._name}/{self._attempt}/{name}", text)

    def _wait(self, name: str, *, remove: bool = False) -> str:
        return self._wait_any(name, remove=remove)[1]

    def _wait_any(self, *names: str, remove: bool = False) -> tuple[str, str]:
        deadline: float | None = None
        while True:
            for name in names:
                if (text := self._coordinator.read_post(f"{self._name}/{name}", remove=remove)) is not None:
                    return name, text
            if deadline is None and self._coordinator.any_failed():
                deadline = time.monotonic() + _LAST_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                raise CheckpointError("A checkpoint that all processes write was given up: one of them has failed. "
                                      "The earlier ones are untouched.")
            time.sleep(_POLL_SECONDS)
