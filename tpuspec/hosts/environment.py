"""What the environment variables of a launch say, checked; RANK and WORLD_SIZE are read by `tpuspec.cluster`."""

from __future__ import annotations

import os

from tpuspec.errors import ConfigError


def read_first_address(world: int) -> tuple[str, int]:
    """Returns host and port where the first of several processes is reached.

    Raises:
      ConfigError: MASTER_ADDR or MASTER_PORT is missing or wrong.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ConfigError(f"RANK and WORLD_SIZE={world} are set, and {' and '.join(missing)} not: where the first "
                          "process can be reached. torchrun sets all four.")
    return os.environ["MASTER_ADDR"], parse_port(os.environ["MASTER_PORT"])


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
