"""A process's place among those that run together, as the environment variables of torchrun or srun say."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tpuspec.errors import ConfigError

SLURM_TASKS = "SLURM_STEP_NUM_TASKS"
"""Set by srun alone, not in a batch script."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A process's place: `task_index` among `num_workers` processes; an evaluator stands outside."""

    task_type: str
    task_index: int
    num_workers: int

    @property
    def is_chief(self) -> bool:
        """Whether this is the first worker."""
        return self.task_type == "worker" and self.task_index == 0


def _read_slurm(task_type: str) -> Cluster:
    tasks, number = os.environ.get(SLURM_TASKS, "1"), os.environ.get("SLURM_PROCID")
    if tasks == "1":
        return Cluster(task_type=task_type, task_index=0, num_workers=1)
    if number is None:
        raise ConfigError(
            f"srun started {tasks} tasks, and neither SLURM_PROCID nor RANK and WORLD_SIZE are set: each task would "
            "run alone. Let srun start one torchrun a node, or export RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in "
            "each task.")
    if not tasks.isdecimal() or not number.isdecimal() or not int(number) < int(tasks):
        raise ConfigError(f"The environment variable SLURM_PROCID must be a number in 0 .. {SLURM_TASKS} - 1; got "
                          f"SLURM_PROCID={number!r}, {SLURM_TASKS}={tasks!r}.")
    return Cluster(task_type=task_type, task_index=int(number), num_workers=int(tasks))


def read_cluster(task_type: str) -> Cluster:
    """Reads torchrun's RANK and WORLD_SIZE, or else what srun sets; neither means one process alone.

    Raises:
      ConfigError: an unknown task type, one variable without the other, or a rank out of range.
    """
    if task_type not in ("worker", "evaluator"):
        raise ConfigError(f"task_type must be 'worker' or 'evaluator'; got {task_type!r}.")
    if task_type == "evaluator":
        if os.environ.get("RANK", "0") != "0":
            raise ConfigError("task_type='evaluator': there can only be one `evaluator` task; got RANK="
                              f"{os.environ['RANK']!r}. Start one process, without torchrun.")
        return Cluster(task_type=task_type, task_index=0, num_workers=0)
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None and world is None:
        return _read_slurm(task_type)
    if rank is None or world is None:
        raise ConfigError("The environment variables RANK and WORLD_SIZE must be set both or neither; got "
                          f"RANK={rank!r}, WORLD_SIZE={world!r}. Start with torchrun, which sets them.")
    if not rank.isdecimal() or not world.isdecimal() or not int(rank) < int(world):
        raise ConfigError(f"The environment variable RANK must be a number in 0 .. WORLD_SIZE - 1; got RANK={rank!r}, "
                          f"WORLD_SIZE={world!r}.")
    return Cluster(task_type=task_type, task_index=int(rank), num_workers=int(world))
