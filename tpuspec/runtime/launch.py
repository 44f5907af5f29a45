"""Who is who among the processes of a run, as the environment says it."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from tpuspec.cluster import read_cluster
from tpuspec.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchInfo:
    """This process among those of its run.

    Attributes:
      launcher: 'torchrun', 'environment' (RANK and WORLD_SIZE set by hand, as under srun) or 'alone'.
      host_index: its number, 0 for the chief.
      num_hosts: processes of the run.
      local_rank: its number on this machine, which picks its GPU.
      is_chief: whether it writes checkpoints and summaries.
      hostname: of this machine.
      pid: of this process.
      chief_address: where the first process is reached, 'host:port'; None alone.
    """

    launcher: str
    host_index: int
    num_hosts: int
    local_rank: int
    is_chief: bool
    hostname: str
    pid: int
    chief_address: str | None


def launch_info() -> LaunchInfo:
    """Reads the environment; starts and joins nothing.

    Raises:
      ConfigError: variables are missing or contradict one another.
    """
    cluster = read_cluster("worker")
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    if not local.isdecimal():
        raise ConfigError(f"The environment variable LOCAL_RANK must be a number; got {local!r}.")
    launcher = "alone" if "RANK" not in os.environ else (
        "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "environment")
    address = (f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
               if cluster.num_workers > 1 else None)
    return LaunchInfo(
        launcher=launcher, host_index=cluster.task_index, num_hosts=cluster.num_workers, local_rank=int(local),
        is_chief=cluster.is_chief, hostname=socket.gethostname(), pid=os.getpid(), chief_address=address)
