"""Who is who among the processes of a run."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from tpuspec.cluster import read_cluster
from tpuspec.hosts.environment import read_first_address, read_local_rank
from tpuspec.hosts.process_group import joined


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchInfo:
    """This process among those of its run.

    Attributes:
      launcher: 'torchrun', 'environment' (RANK and WORLD_SIZE set by hand), 'srun', 'pod' (hosts of a TPU pod that have
        met) or 'alone'.
      host_index: its number, 0 for the chief.
      num_hosts: processes of the run.
      local_rank: its number on this machine, which picks its GPU.
      is_chief: whether it writes checkpoints and summaries.
      hostname: of this machine.
      pid: of this process.
      chief_address: where the environment says that the first process is reached, 'host:port'; None where it does
        not.
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

    The hosts of a TPU pod know who they are once a Trainer has started its devices; before that each is alone.

    Raises:
      ConfigError: variables are missing or contradict one another.
    """
    cluster = read_cluster("worker")
    has_rank = "RANK" in os.environ
    pod = joined() if not has_rank and cluster.num_workers == 1 else None
    launcher = "pod" if pod else ("alone" if cluster.num_workers == 1 else "srun") if not has_rank else (
        "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "environment")
    index, num_hosts = (pod.host_index, pod.num_hosts) if pod else (cluster.task_index, cluster.num_workers)
    address = None if num_hosts == 1 or pod else "{}:{}".format(*read_first_address(num_hosts))
    return LaunchInfo(
        launcher=launcher, host_index=index, num_hosts=num_hosts, local_rank=read_local_rank(), is_chief=index == 0,
        hostname=socket.gethostname(), pid=os.getpid(), chief_address=address)
