"""Imports torch once and forks the processes of each test: a line of JSON orders one, and is answered at its end."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import linear

JOBS = {"linear": linear.run}
if os.environ.get("TEST_ZYGOTE") == "xla":
    import jax  # noqa: F401
    import recipe_job
    import torch_xla  # noqa: F401

    JOBS["recipe"] = recipe_job.run

ENV = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")


def start(order: dict[str, Any], rank: int) -> int:
    """Forks one process, which ends as any Python program does."""
    pid = os.fork()
    if pid:
        return pid
    out = Path(order["out"])
    for number, name in ((0, os.devnull), (1, out / f"stdout{rank}"), (2, out / f"stderr{rank}")):
        file = os.open(name, os.O_RDWR | os.O_CREAT, 0o644)
        os.dup2(file, number)
    if order["options"].get("launcher") == "srun":
        os.environ.update(SLURM_STEP_NUM_TASKS=str(order["hosts"]), SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank),
                          SLURM_STEP_NODELIST="localhost", SLURM_JOB_ID=str(order["port"]), SLURM_STEP_ID="0")
    elif order["hosts"] > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(order["hosts"]), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(order["port"]))
    os.environ.update(order["environment"])
    JOBS[order["kind"]](order["job"], out, **order["options"])
    sys.exit(0)


def wait(pids: list[int], seconds: float) -> tuple[list[int], float]:
    """Waits for all, and kills what is stopped when the others have ended.

    Returns exit codes, and the seconds from the first end to the last.
    """
    codes: dict[int, int] = {}
    first_end = last_end = 0.0
    deadline = time.monotonic() + seconds
    stopped: set[int] = set()
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
                if done and os.WIFSTOPPED(status):
                    stopped.add(pid)
                    first_end = first_end or time.monotonic()
                elif done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                    first_end = first_end or time.monotonic()
                    last_end = time.monotonic()
        if len(codes) + len(stopped - codes.keys()) == len(pids) or time.monotonic() > deadline:
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
                    codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if pid in stopped else -999
        time.sleep(0.05)
    return [codes[pid] for pid in pids], last_end - first_end


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        pids = []
        for rank in range(order["hosts"]):
            pids.append(start(order, rank))
        codes, seconds = wait(pids, order["seconds"])
        print(json.dumps({"codes": codes, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
