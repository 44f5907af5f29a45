"""What the environment variables of a launch say, checked; who is who of how many is read by `tpuspec.cluster`."""

from __future__ import annotations

import os
import re

from tpuspec.errors import ConfigError

_FIRST_PORT, _NUM_PORTS = 61440, 4096


def read_first_address(world: int) -> tuple[str, int]:
    """Returns host and port where the first of several processes is reached.

    Under srun, unless MASTER_ADDR and MASTER_PORT say it, that is its first node, and a port made of the job's number.

    Raises:
      ConfigError: MASTER_ADDR or MASTER_PORT is missing or wrong.
    """
    if "RANK" not in os.environ:
        return os.environ.get("MASTER_ADDR") or _first_node(), parse_port(
            os.environ.get("MASTER_PORT") or str(_port_of_step()))
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ConfigError(f"RANK and WORLD_SIZE={world} are set, and {' and '.join(missing)} not: where the first "
                          "process can be reached. torchrun sets all four.")
    return os.environ["MASTER_ADDR"], parse_port(os.environ["MASTER_PORT"])


def _first_node() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST", "")
    # node07, node07,node09, node[07-09,12] or node[07,09]-ib
    match = re.match(r"([^\[\],]+)(?:\[([^\[\],-]+)[^\]]*\]([^,\[\]]*))?", nodes)
    if match is None:
        raise ConfigError(f"srun started several tasks, and SLURM_STEP_NODELIST={nodes!r} names no node: set "
                          "MASTER_ADDR and MASTER_PORT to where the first task is reached.")
    return match[1] + (match[2] or "") + (match[3] or "")


def _port_of_step() -> int:
    job, step = (os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    if not job.isdecimal():
        raise ConfigError(f"srun started several tasks, and SLURM_JOB_ID={job!r} is no number: set MASTER_ADDR and "
                          "MASTER_PORT to where the first task is reached.")
    # Jobs that share a node have other ports, and so have the steps of a job.
    return _FIRST_PORT + (int(job) + 61 * int(step if step.isdecimal() else 0)) % _NUM_PORTS


def parse_port(text: str) -> int:
    """Returns the number of a port; 0 lets the system choose.

    Raises:
      ConfigError: it is none.
    """
    if not text.isdecimal() or int(text) > 65535:
        raise ConfigError(f"The environment variable MASTER_PORT must be a number in 0 .. 65535; got {text!r}.")
    return int(text)


def read_local_rank() -> int:
    """Returns this process's number on its machine, by torchrun or SLURM; 0 where neither says one.

    Raises:
      ConfigError: it is no number.
    """
    name = "LOCAL_RANK" if "LOCAL_RANK" in os.environ else "SLURM_LOCALID"
    text = os.environ.get(name, "0")
    if not text.isdecimal():
        raise ConfigError(f"The environment variable {name} must be a number; got {text!r}.")
    return int(text)
