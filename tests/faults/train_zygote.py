"""Imports torch_xla once and forks `python -m tpuspec.train`: a line of JSON orders a run, another asks for its end."""

from __future__ import annotations

import json
import os
import random
import sys

import numpy as np
import torch_xla  # noqa: F401 - what takes seconds to import

import tpuspec.runtime.xla_replicas
import tpuspec.train


def start(arguments: list[str], output: str, seed: int) -> int:
    """Forks a run, whose output goes to a file; returns its process number."""
    pid = os.fork()
    if pid:
        return pid
    random.seed(seed)
    np.random.seed(seed)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # As an interpreter ends: threads are joined, and what they raise is seen.
    sys.exit(tpuspec.train.main(arguments))


def main() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "pid" in order:
            _, status = os.waitpid(order["pid"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
        else:
            print(start(**order), flush=True)


if __name__ == "__main__":
    main()
