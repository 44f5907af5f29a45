"""The whole Trainer with steps_per_execution=1, which is the default: each step is a program of its own."""

from __future__ import annotations

from collections.abc import Callable

from step_contenders import tpuspec_trainer

NEEDS = tpuspec_trainer.NEEDS


def prepare(workload_name: str) -> Callable[[int], float]:
    return tpuspec_trainer.prepare(workload_name, steps_per_execution=1)
