"""Accelerate on the XLA device with a model of transformers, mixed_precision="bf16"."""

from __future__ import annotations

import time
from collections.abc import Callable

from step_contenders import transformers_models as models

NEEDS = ("torch_xla", "transformers", "accelerate")
NUM_WARM_UP = 5


def prepare(name: str) -> Callable[[int], float]:
    from accelerate import Accelerator

    from step_contenders.stream import make_loader

    batches, module = models.batches(name), models.build(name)
    accelerator = Accelerator(mixed_precision="bf16")
    own = models.make_optimizer(module)
    module, optimizer, schedule = accelerator.prepare(module, own, models.make_schedule(own))
    module.train()

    def measure(num_steps: int) -> float:
        begun, loss = 0.0, None
        for k, (features, labels) in enumerate(accelerator.prepare(make_loader(batches, NUM_WARM_UP + num_steps))):
            optimizer.zero_grad()
            loss = models.loss_of(module, {key: value.to(accelerator.device) for key, value in features.items()},
                                  labels.to(accelerator.device))
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(module.parameters(), models.CLIP_NORM)
            optimizer.step()
            schedule.step()
            if k == NUM_WARM_UP - 1:
                loss.item()
                begun = time.perf_counter()
        assert loss is not None
        loss.item()
        return (time.perf_counter() - begun) / num_steps * 1e3

    return measure
