"""Imports torch_xla once and forks `python -m tpuspec.train`: a line of JSON orders a run, another asks for its end."""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import signal
import sys

import numpy as np
import torch.export._trace  # noqa: F401 - likewise
import torch_xla  # noqa: F401 - what takes seconds to import

import tpuspec.runtime.xla_replicas
import tpuspec.train


def start(arguments: list[str], output: str, seed: int = 0, errors: str | None = None, folder: str = ".",
          file_bytes: int | None = None) -> int:
    """Forks a run, whose output goes to a file, its errors to another where one is given; returns its process number.

    The run is a process group of its own. No file of it may grow beyond `file_bytes`.
    """
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    # A shell's background job ignores SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed(seed)
    np.random.seed(seed)
    os.chdir(folder)
    for number, name in ((1, output), (2, errors or output)):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, number)
        os.close(file)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    # As an interpreter ends: threads are joined, and what they raise is seen.
    tpuspec.train.command(arguments)
    return 0


def main() -> None:
    gc.freeze()  # what is imported need not be looked through, and so copied, by each run
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
