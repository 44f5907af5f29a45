"""A process's place among those that run together, as torchrun's environment variables say."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tpuspec.errors import ConfigError


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


def read_cluster(task_type: str) -> Cluster:
    """Reads torchrun's RANK and WORLD_SIZE; neither set means one process alone.

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
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")  # set by srun alone
        if tasks != "1":
            raise ConfigError(
                f"srun started {tasks} tasks, and RANK and WORLD_SIZE are not set: each task would run alone. Let srun "
                "start one torchrun a node, or export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS, MASTER_ADDR and "
                "MASTER_PORT in each task.")
        return Cluster(task_type=task_type, task_index=0, num_workers=1)
    if rank is None or world is None:
        raise ConfigError("The environment variables RANK and WORLD_SIZE must be set both or neither; got "
                          f"RANK={rank!r}, WORLD_SIZE={world!r}. Start with torchrun, which sets them.")
    if not rank.isdecimal() or not world.isdecimal() or not int(rank) < int(world):
        raise ConfigError(f"The environment variable RANK must be a number in 0 .. WORLD_SIZE - 1; got RANK={rank!r}, "
                          f"WORLD_SIZE={world!r}.")
    return Cluster(task_type=task_type, task_index=int(rank), num_workers=int(world))
