"""Trains, evaluates and predicts the digits in turn within one process, and notes behind each turn what it holds."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch.utils.data import DataLoader

import tpuspec
import tpuspec.recipes.digits as digits

STEPS_PER_TURN, SAVE_EVERY_STEPS, KEPT_CHECKPOINTS = 20, 10, 2
_BALLAST_FLOATS = 1_000_000
_libc = ctypes.CDLL(None)
_M_ARENA_MAX = -8
_BATCH_SIZE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a process holds at rest behind a turn.

    Attributes:
      step: global step.
      anonymous_bytes: memory that is no file's, in RAM or swapped out. Unlike psutil's uss, libraries do not count,
        which the kernel drops and reads again.
      num_threads: of the process, Python's or not.
      num_files: open descriptors.
      num_children: processes that it started and that live.
    """

    step: int
    anonymous_bytes: int
    num_threads: int
    num_files: int
    num_children: int


class _Evaluation(tpuspec.CheckpointSaverListener):
    """Evaluates at each checkpoint within the training."""

    def __init__(self, trainer: tpuspec.Trainer) -> None:
        self._trainer = trainer

    def after_save(self, global_step):
        self._trainer.evaluate(digits.input_fn, steps=2, name="saved")


def settle_memory() -> None:
    """Gives what is free back to the kernel, so that what a process has is what it uses."""
    gc.collect()
    # Some small block on top of the heap may keep the many megabytes below it, which a compiler once used.
    _libc.malloc_trim(0)


def model(params):
    """Returns the digits' network with four megabytes that cost no time, so that each copy of the state shows."""
    module = digits.model(params)
    module.register_buffer("ballast", torch.zeros(_BALLAST_FLOATS))
    return module


def by_worker(params, mode):
    """Draws the digits in a process of its own."""
    return DataLoader(digits.input_fn(params, mode), batch_size=_BATCH_SIZE, num_workers=1)


def main(arguments: list[str]) -> None:
    """Takes turns.

    Args:
      arguments: model_dir, the file to note in, the number of turns, of replicas, and 'xla' or 'native'.
    """
    model_dir, notes, num_turns, num_replicas, path = arguments
    _libc.mallopt(_M_ARENA_MAX, 1)  # else each thread may take some megabytes of its own, sooner or later
    logging.basicConfig(level=logging.ERROR)
    trainer = tpuspec.Trainer(
        digits.model_fn, model=model, optimizer=digits.optimizer, model_dir=model_dir, use_tpu=path == "xla",
        params={"width": 16, "dropout": 0.25, "learning_rate": 0.002, "weight_decay": 0.01},
        train_batch_size=_BATCH_SIZE, eval_batch_size=_BATCH_SIZE, predict_batch_size=_BATCH_SIZE,
        config=tpuspec.RunConfig(
            seed=1, show_progress=False, save_checkpoints_steps=SAVE_EVERY_STEPS, save_summary_steps=5,
            keep_checkpoint_max=KEPT_CHECKPOINTS,
            tpu_config=tpuspec.TPUConfig(iterations_per_loop=5, num_shards=int(num_replicas))))
    process = psutil.Process()
    for turn in range(int(num_turns)):
        trainer.train(digits.input_fn, steps=STEPS_PER_TURN, saving_listeners=[_Evaluation(trainer)])
        trainer.evaluate(by_worker if turn % 5 == 4 else digits.input_fn)
        assert sum(1 for _ in trainer.predict(digits.input_fn)) == 360
        settle_memory()
        with process.oneshot():
            memory = process.memory_full_info()
            held = Held(step=trainer.global_step(), anonymous_bytes=memory.rss - memory.shared + memory.swap,
                        num_threads=process.num_threads(), num_files=process.num_fds(),
                        num_children=len(process.children(recursive=True)))
        with Path(notes).open("a") as file:
            file.write(json.dumps(dataclasses.asdict(held)) + "\n")


def read_notes(notes: Path) -> list[Held]:
    """Reads what one process noted; a line that a kill tore is left out."""
    lines = notes.read_bytes().split(b"\n")[:-1] if notes.exists() else []
    return [Held(**json.loads(line)) for line in lines]
