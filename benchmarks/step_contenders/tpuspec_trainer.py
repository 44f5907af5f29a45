"""The whole Trainer: its own input pipeline, the loss of every step brought to the host, summaries and progress.

Where steps are so short that starting a program takes longer, several are one program (`steps_per_execution`).
Checkpoints are off, as with the others. The first loop of each call, which holds the start of the input, is left out.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable

from step_contenders.workloads import WORKLOADS, loss_of

NEEDS = ("torch_xla",)
STEPS_PER_LOOP = 100


def prepare(workload_name: str, *, num_replicas: int = 1, steps_per_execution: int | None = None,
            steps_per_loop: int = STEPS_PER_LOOP) -> Callable[[int], float]:
    import tpuspec

    class Stopwatch(tpuspec.SessionRunHook):
        def __init__(self) -> None:
            self.loop_starts: list[float] = []
            self.end_time = 0.0

        def before_run(self, context):  # weights are readable: the steps before have run
            self.loop_starts.append(time.perf_counter())

        def end(self, context):  # every loss is on the host by now
            self.end_time = time.perf_counter()

    def model_fn(features, labels, mode, params, model, optimizer):
        loss = loss_of(model(features), labels)
        return tpuspec.TPUEstimatorSpec(
            mode, loss=loss, train_op=tpuspec.CrossShardOptimizer(optimizer).minimize(loss))

    logging.getLogger("tpuspec").setLevel(logging.ERROR)
    workload = WORKLOADS[workload_name]
    batches = workload.batches()
    loop_length = min(steps_per_loop, workload.num_steps)
    trainer = tpuspec.Trainer(
        model_fn, model=workload.build_seeded(),
        optimizer=lambda module, params: workload.make_optimizer(module.parameters()),
        model_dir=tempfile.mkdtemp(), train_batch_size=workload.batch_size,
        config=tpuspec.RunConfig(
            seed=0, show_progress=False, save_checkpoints_secs=None,
            tpu_config=tpuspec.TPUConfig(iterations_per_loop=loop_length, num_shards=num_replicas,
                                         steps_per_execution=steps_per_execution or workload.steps_per_execution)))

    def measure(num_steps: int) -> float:
        stopwatch, total = Stopwatch(), loop_length + num_steps

        def input_fn(params):
            return (batches[k % len(batches)] for k in range(total))

        trainer.train(input_fn, hooks=[stopwatch], steps=total)
        return (stopwatch.end_time - stopwatch.loop_starts[1]) / num_steps * 1e3

    return measure
