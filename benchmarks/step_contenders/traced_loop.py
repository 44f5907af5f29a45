"""A loop by hand, as torch_xla's documentation writes it: send, forward, backward, xm.optimizer_step, sync.

It reads no loss, so that its steps run ahead of the device: the best that a traced loop can do.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from step_contenders.workloads import WORKLOADS, loss_of

NEEDS = ("torch_xla",)
NUM_WARM_UP = 5


def prepare(workload_name: str, *, capturable: bool = False) -> Callable[[int], float]:
    import torch_xla
    import torch_xla.core.xla_model as xm

    workload = WORKLOADS[workload_name]
    device, batches = torch_xla.device(), workload.batches()
    module = workload.build_seeded().to(device)
    optimizer = workload.make_optimizer(module.parameters())
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = capturable

    def run(num_steps: int) -> None:
        for k in range(num_steps):
            x, y = (tensor.to(device) for tensor in batches[k % len(batches)])
            optimizer.zero_grad()
            loss_of(module(x), y).backward()
            xm.optimizer_step(optimizer)
            torch_xla.sync()
        xm.wait_device_ops()

    def measure(num_steps: int) -> float:
        run(NUM_WARM_UP)
        begun = time.perf_counter()
        run(num_steps)
        return (time.perf_counter() - begun) / num_steps * 1e3

    return measure
