"""The whole Trainer: its own input pipeline, the loss of every step brought to the host, summaries and progress.

Where steps are so short that starting a program takes longer, several are one program (`steps_per_execution`).
Checkpoints are off, as with the others, and there are no hooks, after which a step is traced and compared once more.
Time is taken where the input is drawn, a fixed number of steps ahead of the device; the first steps of each call, which
are traced and checked more often, are left out.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable

from step_contenders.workloads import WORKLOADS, loss_of

NEEDS = ("torch_xla",)
STEPS_PER_LOOP = 100
LEAST_WARM_UP, MOST_WARM_UP = 50, 300  # batches are drawn up to two dozen steps ahead


def prepare(workload_name: str, *, num_replicas: int = 1, steps_per_execution: int | None = None,
            steps_per_loop: int = STEPS_PER_LOOP, num_warm_up: int | None = None) -> Callable[[int], float]:
    import tpuspec

    def model_fn(features, labels, mode, params, model, optimizer):
        loss = loss_of(model(features), labels)
        return tpuspec.TPUEstimatorSpec(
            mode, loss=loss, train_op=tpuspec.CrossShardOptimizer(optimizer).minimize(loss))

    logging.getLogger("tpuspec").setLevel(logging.ERROR)
    workload = WORKLOADS[workload_name]
    batches = workload.batches()
    trainer = tpuspec.Trainer(
        model_fn, model=workload.build_seeded(),
        optimizer=lambda module, params: workload.make_optimizer(module.parameters()),
        model_dir=tempfile.mkdtemp(), train_batch_size=workload.batch_size,
        config=tpuspec.RunConfig(
            seed=0, show_progress=False, save_checkpoints_secs=None,
            tpu_config=tpuspec.TPUConfig(iterations_per_loop=steps_per_loop, num_shards=num_replicas,
                                         steps_per_execution=steps_per_execution or workload.steps_per_execution)))

    def measure(num_steps: int) -> float:
        num_first = min(MOST_WARM_UP, max(LEAST_WARM_UP, 2 * num_steps)) if num_warm_up is None else num_warm_up
        drawn: list[float] = []

        def input_fn(params):
            for k in range(num_first + num_steps):
                drawn.append(time.perf_counter())
                yield batches[k % len(batches)]

        trainer.train(input_fn, steps=num_first + num_steps)
        return (drawn[-1] - drawn[num_first - 1]) / num_steps * 1e3

    return measure
