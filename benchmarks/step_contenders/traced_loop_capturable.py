"""The loop by hand whose losses and weights are the Trainer's, bit for bit: AdamW counts its steps on the device.

Without capturable=True torch counts them on the host, which traces faster and gives other last bits.
"""

from __future__ import annotations

from collections.abc import Callable

from step_contenders import traced_loop

NEEDS = traced_loop.NEEDS


def prepare(workload_name: str) -> Callable[[int], float]:
    return traced_loop.prepare(workload_name, capturable=True)
