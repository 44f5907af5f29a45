"""Trainings that are killed and go on, time and again, with evaluations and predictions between: nothing piles up."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.aftermath import verified_steps
from tests.faults.soak import KEPT_CHECKPOINTS, SAVE_EVERY_STEPS, Held, read_notes
from tests.faults.zygote_process import Zygote
from tpuspec.checkpoint.format import MODEL, STATE_FILE

WARM_UP_TURNS = 2
_RUN_SECONDS = 1200.0
# Seen: 0.15 MB over 40 turns. A copy of the state is 4 MB, a compiled step of the digits some tenths of one.
MOST_BYTES_PER_TURN = 20_000
MOST_BYTES_OF_ALLOCATORS = 600_000
# Seen: 6 MB between processes that do the same, in no order. The sizes of checkpoints are compared besides.
_MOST_BYTES_BETWEEN_STARTS = 16_000_000


class Soak:
    """Processes that take turns in one model_dir, one behind the other.

    Args:
      zygote: forks them.
      folder: of the run.
      num_replicas: of each.
      path: 'xla' or 'native'.
    """

    def __init__(self, zygote: Zygote, folder: Path, num_replicas: int, path: str) -> None:
        self.model_dir = folder / "run"
        self.num_processes = 0
        self._zygote, self._folder, self._arguments = zygote, folder, [str(num_replicas), path]

    def take_turns(self, num_turns: int, kill_after: float | None) -> list[Held]:
        """Runs a process; returns what it noted.

        Args:
          num_turns: it takes.
          kill_after: seconds behind its last but one turn; None lets it end.
        """
        self.num_processes += 1
        notes, output = (self._folder / f"{name} {self.num_processes}" for name in ("notes", "output"))
        pid = self._zygote.start(program="tests.faults.soak:main", output=str(output), arguments=[
            str(self.model_dir), str(notes), str(num_turns), *self._arguments])
        if kill_after is not None:
            self._wait_for(lambda: len(read_notes(notes)) >= num_turns - 1, pid, output)
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)
        code = self._zygote.wait(pid)
        assert code in ((0,) if kill_after is None else (0, -signal.SIGKILL)), f"{code}: {output.read_text()[-3000:]}"
        return read_notes(notes)

    def _wait_for(self, condition: Callable[[], bool], pid: int, output: Path) -> None:
        deadline = time.monotonic() + _RUN_SECONDS
        while not condition():
            assert os.path.exists(f"/proc/{pid}/exe") and time.monotonic() < deadline, output.read_text()[-3000:]
            time.sleep(0.01)

    def files(self) -> dict[str, int]:
        """The names of what lies beside the checkpoints, those of event files without their numbers, and how many."""
        found: dict[str, int] = {}
        for path in self.model_dir.rglob("*"):
            if path.is_file() and not path.parent.name.startswith("checkpoint-"):
                name = str(path.relative_to(self.model_dir)).partition(".tfevents.")[0]
                found[name] = found.get(name, 0) + 1
        return found

    def sizes(self) -> dict[str, int]:
        """The files of the newest checkpoint, and how large they are."""
        newest = self.model_dir / f"checkpoint-{verified_steps(self.model_dir)[-1]}"
        return {path.name: path.stat().st_size for path in newest.iterdir()}


def check_flat(held: list[Held]) -> None:
    """Fails where a process holds more and more, turn by turn, once it has what it needs."""
    settled = held[WARM_UP_TURNS:]
    assert len(settled) >= 6, "too few turns tell nothing"
    third = len(settled) // 3
    first, last = settled[:third], settled[-third:]
    for name in ("num_threads", "num_files", "num_children"):
        assert max(getattr(one, name) for one in last) <= max(getattr(one, name) for one in first), (name, held)
    grown = min(one.anonymous_bytes for one in last) - min(one.anonymous_bytes for one in first)
    assert grown < MOST_BYTES_OF_ALLOCATORS + MOST_BYTES_PER_TURN * (len(settled) - third), (grown, held)


def soak(soaked: Soak, num_processes: int, num_turns: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Kills all processes but the last one, and checks what they held, and what is left of them."""
    seed = random.randrange(2**32)
    rng, starts, sizes, last_step = random.Random(seed), [], [], 0
    for number in range(1, num_processes + 1):
        held = soaked.take_turns(num_turns, rng.uniform(0, 0.5) if number < num_processes else None)
        check_flat(held)
        with capsys.disabled():
            print(f"soak, seed {seed}, process {number}: {len(held)} turns, steps {held[0].step} to {held[-1].step}, "
                  f"{held[0]} to {held[-1]}")
        assert held[0].step > last_step, "no commit was lost"
        assert verified_steps(soaked.model_dir)[-1] >= held[-1].step, "each turn ends with a commit"
        last_step = held[-1].step
        starts.append(held[WARM_UP_TURNS])
        sizes.append(soaked.sizes())
    # A process that went on holds no more than the first one, which also made the first weights.
    for name in ("num_threads", "num_files", "num_children"):
        assert max(getattr(one, name) for one in starts) == getattr(starts[0], name), starts
    resumed = [one.anonymous_bytes for one in starts[1:]]  # the first one had nothing to restore
    assert max(resumed) < min(resumed) + _MOST_BYTES_BETWEEN_STARTS, starts
    # Numbers of steps and the positions of random generators have more or fewer digits.
    assert all(abs(size[name] - sizes[0][name]) < 500 for size in sizes for name in size), sizes
    assert {STATE_FILE, f"{MODEL}.safetensors"} < sizes[0].keys()
    # The last process ended by itself, and swept what the killed ones had left.
    assert len(list(soaked.model_dir.glob("checkpoint-*"))) == KEPT_CHECKPOINTS
    assert verified_steps(soaked.model_dir) == [last_step - SAVE_EVERY_STEPS, last_step]
    logs = {f"{folder}{name}" for folder in ("", "eval/", "eval_saved/") for name in ("events.out", "metrics.jsonl")}
    assert soaked.files().keys() == logs | {".writer.lock"}
    assert all(number == (soaked.num_processes if name.endswith("events.out") else 1)
               for name, number in soaked.files().items()), soaked.files()


@pytest.mark.slow
def test_fault_55_kills_resumes_and_evaluations_leave_memory_threads_and_files_flat(zygote, tmp_path, capsys):
    soak(Soak(zygote, tmp_path, 1, "xla"), 3, 11, capsys)


@pytest.mark.long
@pytest.mark.parametrize(("num_replicas", "path"), [(1, "xla"), (2, "xla"), (1, "native")])
def test_fault_55_many_kills_resumes_and_evaluations_leave_memory_threads_and_files_flat(
        zygote, tmp_path, capsys, num_replicas, path):
    soak(Soak(zygote, tmp_path, num_replicas, path), 6, 100, capsys)
