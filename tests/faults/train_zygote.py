"""Imports torch_xla once and forks runs: a line of JSON orders one, another asks for its end."""

from __future__ import annotations

import gc
import json
import os
import pkgutil
import random
import resource
import signal
import sys

import numpy as np
import torch.export._trace  # noqa: F401 - what takes seconds to import
import torch_xla  # noqa: F401 - likewise

import tpuspec.tracer.xla
import tpuspec.train  # noqa: F401


def start(arguments: list[str], output: str, seed: int = 0, errors: str | None = None, folder: str = ".",
          file_bytes: int | None = None, program: str = "tpuspec.train:command") -> int:
    """Forks a run, which is a process group of its own; returns its process number.

    Args:
      arguments: of the program.
      output: file of what it prints.
      seed: of Python's and numpy's random numbers.
      errors: file of its standard error; None takes `output`.
      folder: where it runs.
      file_bytes: what no file of it may grow beyond; None sets no limit.
      program: the function that is called with the arguments; the command line, if nothing else is said.
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
    sys.exit(pkgutil.resolve_name(program)(arguments))


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
