"""Runs of the command line as processes of their own, and what each of them must leave behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.checkpoints import damaged_steps
from tests.faults.faulty import SIGNALLED_FILE
from tests.faults.zygote_process import Zygote
from tpuspec.checkpoint.store import CheckpointStore

CONFIG = ["config=faulty", f"--config-dir={Path(__file__).parent / 'configs'}", "allow=[tests.faults.]"]
_SECONDS_TO_BE_GONE = 10.0
_RUN_SECONDS = 240.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a run ended.

    Attributes:
      code: its exit code.
      out, err: what it printed.
      seconds: from its last signal, which it may have given itself, or its start, to its end.
      model_dir: of the run.
    """

    code: int
    out: str
    err: str
    seconds: float
    model_dir: Path

    @property
    def first_line(self) -> str:
        """The first line of its errors, but for torch_xla's warnings."""
        return next(line for line in self.err.splitlines() if line.startswith(("error: ", "interrupted")))

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, each of them whole."""
        store = CheckpointStore(self.model_dir)
        assert damaged_steps(store) == []
        return store.steps()

    def last_step(self) -> int:
        """The step that the run says it stopped at; its checkpoint is the newest."""
        words = self.err.partition("stopped at step ")[2]
        step = int(words.partition(",")[0])
        assert self.steps()[-1] == step
        return step


class Commands:
    """Runs `config=faulty`, with what its arguments say."""

    def __init__(self, zygote: Zygote) -> None:
        self._zygote = zygote
        self._num_runs = 0

    def start(self, folder: Path, *arguments: str, file_bytes: int | None = None) -> Run:
        """Starts `config=faulty` in a folder, which holds its output and, where nothing else is said, its model_dir.

        Args:
          folder: of the run.
          arguments: of the command line.
          file_bytes: what no file of it may grow beyond.
        """
        self._num_runs += 1
        out, err = folder / f"out{self._num_runs}", folder / f"err{self._num_runs}"
        given = dict(argument.partition("=")[::2] for argument in arguments)
        model_dir = folder / given.get("model_dir", "run")
        extra = [] if "model_dir" in given else ["model_dir=run"]
        pid = self._zygote.start(arguments=[*CONFIG, *extra, *arguments], output=str(out), errors=str(err),
                                 folder=str(folder), file_bytes=file_bytes)
        return Run(pid, out, err, model_dir, lambda: self._zygote.wait(pid))

    def run(self, folder: Path, *arguments: str, file_bytes: int | None = None) -> Ended:
        """Runs `config=faulty` to its end."""
        return self.start(folder, *arguments, file_bytes=file_bytes).wait()


class Run:
    """A run under way."""

    def __init__(self, pid: int, out: Path, err: Path, model_dir: Path, wait: Callable[[], int]) -> None:
        self.pid, self.model_dir = pid, model_dir
        self._out, self._err, self._wait = out, err, wait
        self._begun = time.monotonic()

    def send(self, number: int, *, to_group: bool = False) -> None:
        """Sends a signal to it, or to it and all its children."""
        (os.killpg if to_group else os.kill)(self.pid, number)
        self._begun = time.monotonic()

    def output(self) -> str:
        """What it has printed so far."""
        return self._out.read_text() if self._out.exists() else ""

    def errors(self) -> str:
        """What it has printed to standard error so far."""
        return self._err.read_text() if self._err.exists() else ""

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Waits until something holds, while the run lives."""
        while not condition():
            assert self._lives(), self._err.read_text()
            time.sleep(0.005)

    def wait(self) -> Ended:
        """Waits for its end, and proves that no process of it is left."""
        while self._lives() and time.monotonic() < self._begun + _RUN_SECONDS:
            time.sleep(0.01)
        ended, hung = time.monotonic(), self._lives()
        if hung:
            os.killpg(self.pid, signal.SIGKILL)
        code = self._wait()
        assert not hung, f"the run did not end:\n{self._err.read_text()[-3000:]}"
        deadline = time.monotonic() + _SECONDS_TO_BE_GONE
        while (left := self._group()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == [], f"{left} are left"
        signalled = self._out.parent / SIGNALLED_FILE
        begun = max(self._begun, float(signalled.read_text()) if signalled.exists() else 0.0)
        return Ended(code=code, out=self._out.read_text(), err=self._err.read_text(), seconds=ended - begun,
                     model_dir=self.model_dir)

    def _lives(self) -> bool:
        try:
            return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def _group(self) -> list[int]:
        found = []
        for process in psutil.process_iter():
            try:
                # The session, for a loader's workers have a group of their own.
                if os.getsid(process.pid) == self.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
            except (psutil.NoSuchProcess, ProcessLookupError):
                continue
        return found
