"""Trains by the command line, and kills it by SIGKILL at random moments: what is committed must load and go on."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.faults.zygote_process import Zygote
from tpuspec.checkpoint.store import CheckpointStore

SAVE_EVERY_STEPS = 3
_RUN_SECONDS = 600.0
_COMMON = ["mode=train", "tpu.iterations_per_loop=3", f"run.save_checkpoints_steps={SAVE_EVERY_STEPS}",
           "run.keep_checkpoint_max=2", "run.save_summary_steps=1", "run.capture=require"]
# gpt_bytes reads Python's own json: nobody edits that while a test runs.
SETTINGS = {
    "digits": [*_COMMON, "config=digits", "params.width=4"],
    "gpt_bytes": [*_COMMON, "config=gpt_bytes", "report=null", f"params.folder={Path(json.__file__).parent}",
                  "params.length=16", "params.width=16", "params.num_layers=2", "params.warm_up_steps=4"],
}


class Trainings:
    """Runs of the command line."""

    def __init__(self, zygote: Zygote) -> None:
        self._zygote = zygote

    def start(self, recipe: str, num_replicas: int, model_dir: Path, max_steps: int) -> int:
        """Starts a run; returns its process number."""
        model_dir.mkdir(parents=True, exist_ok=True)
        arguments = [*SETTINGS[recipe], f"tpu.num_shards={num_replicas}", f"run.max_steps={max_steps}",
                     f"model_dir={model_dir}"]
        # Python's and numpy's random state is the user's to seed; behind a commit it is another, to be put back.
        seed = newest_step(model_dir) + 1
        return self._zygote.start(arguments=arguments, output=f"{model_dir}.log", seed=seed)

    def wait(self, pid: int) -> int:
        """Waits for the end of a run; returns its exit code."""
        return self._zygote.wait(pid)


def newest_step(model_dir: Path) -> int:
    """The newest commit's step by the names of folders alone, for a look that costs nothing; -1 without one."""
    return max((int(path.name.split("-")[1]) for path in model_dir.glob("checkpoint-*")), default=-1)


def load_newest(model_dir: Path) -> int:
    """Reads the newest commit whole, every byte checked; returns its step, -1 without one."""
    store = CheckpointStore(model_dir)
    steps = store.steps()
    if not steps:
        return -1
    # By its name: latest() would fall back from a damaged one, and nothing but damage makes it pass one over.
    return store.load(store.path(steps[-1])).global_step


def tensors_and_values(tree: object, place: str = "") -> Iterator[tuple[str, object]]:
    """Yields the leaves of a tree with their places, tensors as bytes: NaN equals itself, and -0.0 is not 0.0."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from tensors_and_values(value, f"{place}.{key}")
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from tensors_and_values(value, f"{place}.{i}")
    elif isinstance(tree, torch.Tensor):
        yield place, (tree.dtype, tuple(tree.shape), tree.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    else:
        yield place, tree


def differences(model_dir: Path, other: Path) -> list[str]:
    """Names what the newest checkpoints of two folders do not have alike: weights, optimizer, random state, input."""
    found = []
    for folder in (model_dir, other):
        store = CheckpointStore(folder)
        state = store.load(store.path(store.steps()[-1]))
        found.append(dict(tensors_and_values(
            {"step": state.global_step, "model": state.model, "optimizers": state.optimizers, "extra": state.extra})))
    ours, theirs = found
    assert ours, "nothing was compared"
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name, theirs) != theirs.get(name, ours))


@dataclass(frozen=True, slots=True, kw_only=True)
class Killing:
    """What came of a kill.

    Attributes:
      step: of the newest commit before this run.
      killed_at: of the newest commit when it was killed; None where the run had ended before.
    """

    step: int
    killed_at: int | None


def kill_once(trainings: Trainings, recipe: str, num_replicas: int, model_dir: Path, max_steps: int,
              rng: random.Random, *, must_commit: bool) -> Killing:
    """Runs on in model_dir, and kills the run at a random moment: in its start, a compile, a step or a save.

    Args:
      must_commit: whether to kill only behind another commit, which proves that the run went on from the newest.
    """
    before = newest_step(model_dir)
    pid = trainings.start(recipe, num_replicas, model_dir, max_steps)
    num_commits = rng.choice([1, 2, 4]) if must_commit else 0
    reached = min(before + num_commits * SAVE_EVERY_STEPS, max_steps)
    deadline = time.monotonic() + _RUN_SECONDS
    while num_commits and newest_step(model_dir) < reached and os.path.exists(f"/proc/{pid}/exe"):
        assert time.monotonic() < deadline, Path(f"{model_dir}.log").read_text()[-3000:]
        time.sleep(0.002)
    # Behind a commit the next one is some tenths of a second away; a start takes seconds.
    time.sleep(rng.uniform(0, 0.5) if num_commits else rng.uniform(0, 6))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    code = trainings.wait(pid)
    log = Path(f"{model_dir}.log").read_text()
    assert code in (0, -signal.SIGKILL), f"exit code {code}: {log[-3000:]}"
    after = load_newest(model_dir)
    assert after >= before, "a commit was lost"
    assert not must_commit or after >= reached, log[-3000:]
    return Killing(step=before, killed_at=after if code else None)


def finish(trainings: Trainings, recipe: str, num_replicas: int, model_dir: Path, max_steps: int) -> None:
    """Runs on to the last step."""
    code = trainings.wait(trainings.start(recipe, num_replicas, model_dir, max_steps))
    assert code == 0, Path(f"{model_dir}.log").read_text()[-3000:]
    assert load_newest(model_dir) == max_steps
