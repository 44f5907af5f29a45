"""jax's coordination service as a program of its own, which outlives a process that is killed.

Where it ends, jax ends every process that is connected to it at once, before that can say who has failed. Started by
path, for it must not import torch: python rendezvous.py ADDRESS NUM_PROCESSES SILENCE_SECONDS LEAVE_SECONDS. It ends
when its standard input does, and if that has not said 'bye' only after the others had time to.
"""

from __future__ import annotations

import sys
import time

# What jax.distributed.initialize starts in the first process; there is no public call.
from jaxlib import _jax  # type: ignore[attr-defined]  # an extension module

LINGER_SECONDS = 60.0


def main() -> None:
    """Serves until the end of standard input."""
    address, num_processes, silence, leave = sys.argv[1], *map(int, sys.argv[2:5])
    service = _jax.get_distributed_runtime_service(
        address, num_processes, heartbeat_timeout=silence, shutdown_timeout=leave)
    print("ready", flush=True)
    if sys.stdin.read() != "bye":
        time.sleep(LINGER_SECONDS)
    service.shutdown()


if __name__ == "__main__":
    main()
