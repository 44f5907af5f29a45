"""Accelerate on the XLA device: prepare, backward, step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from step_contenders.workloads import WORKLOADS, loss_of

NEEDS = ("torch_xla", "accelerate")
NUM_WARM_UP = 5


def prepare(workload_name: str) -> Callable[[int], float]:
    from accelerate import Accelerator

    from step_contenders.stream import make_loader

    workload = WORKLOADS[workload_name]
    batches, module = workload.batches(), workload.build_seeded()
    accelerator = Accelerator()
    module, optimizer = accelerator.prepare(module, workload.make_optimizer(module.parameters()))

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(module(x.to(accelerator.device)), y.to(accelerator.device))
        accelerator.backward(loss)
        optimizer.step()
        return loss

    return measure_of(step, lambda num_steps: accelerator.prepare(make_loader(batches, num_steps)))


def measure_of(step: Callable[..., Tensor], load: Callable[[int], Iterable[Any]]) -> Callable[[int], float]:
    """Returns what measures a step that returns its loss, in milliseconds; `load` gives so many batches."""
    def measure(num_steps: int) -> float:
        begun, loss = 0.0, None
        for k, (features, labels) in enumerate(load(NUM_WARM_UP + num_steps)):
            loss = step(features, labels)
            if k == NUM_WARM_UP - 1:
                loss.item()
                begun = time.perf_counter()
        assert loss is not None
        loss.item()
        return (time.perf_counter() - begun) / num_steps * 1e3

    return measure
