"""Accelerate on the XLA device with a model of transformers, mixed_precision="bf16"."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from step_contenders import transformers_models as models
from step_contenders.accelerate_xla import measure_of

NEEDS = ("torch_xla", "transformers", "accelerate")


def prepare(name: str) -> Callable[[int], float]:
    from accelerate import Accelerator

    from step_contenders.stream import make_loader

    batches, module = models.batches(name), models.build(name)
    accelerator = Accelerator(mixed_precision="bf16")
    own = models.make_optimizer(module)
    module, optimizer, schedule = accelerator.prepare(module, own, models.make_schedule(own))
    module.train()

    def step(features: dict[str, Tensor], labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = models.loss_of(module, {key: value.to(accelerator.device) for key, value in features.items()},
                              labels.to(accelerator.device))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(module.parameters(), models.CLIP_NORM)
        optimizer.step()
        schedule.step()
        return loss

    return measure_of(step, lambda num_steps: accelerator.prepare(make_loader(batches, num_steps)))
