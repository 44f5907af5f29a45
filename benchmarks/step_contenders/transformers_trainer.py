"""The whole Trainer with a model of transformers, bf16-mixed; capture=require."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable

from step_contenders import transformers_models as models

NEEDS = ("torch_xla", "transformers")
STEPS_PER_LOOP = 100


def prepare(name: str) -> Callable[[int], float]:
    import torch_xla.core.xla_model as xm

    import tpuspec

    class Stopwatch(tpuspec.SessionRunHook):
        def __init__(self) -> None:
            self.begun = self.end_time = 0.0
            self.num_loops = 0

        def before_run(self, context):
            self.num_loops += 1
            if self.num_loops == 2:  # the first has the start of the input
                xm.wait_device_ops()
                self.begun = time.perf_counter()

        def end(self, context):  # every loss is on the host by now
            self.end_time = time.perf_counter()

    def model_fn(features, labels, mode, params, model, optimizer):
        loss = models.loss_of(model, features, labels)
        return tpuspec.TPUEstimatorSpec(mode, loss=loss, train_op=tpuspec.CrossShardOptimizer(optimizer).minimize(
            loss, clip_grad_norm=models.CLIP_NORM))

    logging.getLogger("tpuspec").setLevel(logging.ERROR)
    batches = models.batches(name)
    trainer = tpuspec.Trainer(
        model_fn, model=models.build(name), optimizer=models.make_optimizer, scheduler=models.make_schedule,
        model_dir=tempfile.mkdtemp(), train_batch_size=models.BATCH_SIZE,
        config=tpuspec.RunConfig(seed=models.SEED, show_progress=False, save_checkpoints_secs=None, capture="require",
                                 precision="bf16-mixed",
                                 tpu_config=tpuspec.TPUConfig(iterations_per_loop=STEPS_PER_LOOP, num_shards=1)))

    def measure(num_steps: int) -> float:
        stopwatch, total = Stopwatch(), STEPS_PER_LOOP + num_steps
        trainer.train(lambda params: (batches[k % len(batches)] for k in range(total)), hooks=[stopwatch], steps=total)
        return (stopwatch.end_time - stopwatch.begun) / num_steps * 1e3

    return measure
