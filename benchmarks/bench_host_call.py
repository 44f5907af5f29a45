"""What does a host_call cost a training step: none, a small one, 64x1000 floats, each on every step, and a slow one?

    python benchmarks/bench_host_call.py [--workloads gpt cnn mlp] [--repeats 9] [--steps N]

All variants train the same network in one process, are warm, and take turns. The baseline, `none`, only drains its
loss. `slow` sleeps 20 ms a step: there the host is the limit, and the step must take that long. The first loop of each
training, with the start of the input, is left out. A ratio is the median over the repeats of a variant's time to the
baseline's in the same repeat. CPU is the processor time of all threads, which other work on the machine changes least;
the device is a CPU here, so it is in it. Prints one JSON line for each variant, then a table.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence

os.environ.setdefault("PJRT_DEVICE", "CPU")

import torch
import torch_xla
from interleave import Cost, interleave, median_ratio, spread, table
from step_contenders.workloads import WORKLOADS, loss_of

import tpuspec

VARIANTS = ("none", "small", "large", "slow")
SLEEP_SECONDS = 0.02
LARGE = (64, 1000)


class Stopwatch(tpuspec.SessionRunHook):
    """Notes what was spent by the start of each loop, and when all host work was done."""

    def __init__(self) -> None:
        self.loop_starts: list[Cost] = []
        self.end_of_work = Cost(0.0, 0.0)

    def before_run(self, context):
        self.loop_starts.append(Cost.now())

    def end(self, context):
        self.end_of_work = Cost.now()


def model_fn_of(variant: str) -> Callable:
    def host_call(step, *tensors):
        if variant == "slow":
            time.sleep(SLEEP_SECONDS)

    def model_fn(features, labels, mode, params, model, optimizer, global_step):
        loss = loss_of(model(features), labels)
        tensors = [global_step, loss.reshape(1)]
        if variant == "large":
            tensors = [global_step, loss.detach() + torch.zeros(LARGE, device=loss.device)]
        return tpuspec.TPUEstimatorSpec(
            mode, loss=loss, train_op=tpuspec.CrossShardOptimizer(optimizer).minimize(loss),
            host_call=None if variant == "none" else (host_call, tensors))

    return model_fn


def prepare(workload_name: str, variant: str) -> Callable[[int], Cost]:
    workload = WORKLOADS[workload_name]
    batches = workload.batches()
    loop_length = min(50, workload.num_steps)
    trainer = tpuspec.Trainer(
        model_fn_of(variant), model=workload.build_seeded(),
        optimizer=lambda module, params: workload.make_optimizer(module.parameters()),
        model_dir=tempfile.mkdtemp(), train_batch_size=workload.batch_size,
        config=tpuspec.RunConfig(seed=0, show_progress=False, save_checkpoints_secs=None,
                                 tpu_config=tpuspec.TPUConfig(iterations_per_loop=loop_length)))

    def measure(num_steps: int) -> Cost:
        stopwatch, total = Stopwatch(), loop_length + num_steps
        trainer.train(lambda params: (batches[k % len(batches)] for k in range(total)), hooks=[stopwatch], steps=total)
        return (stopwatch.end_of_work - stopwatch.loop_starts[1]) / num_steps

    return measure


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["gpt", "cnn", "mlp"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--steps", type=int)
    arguments = parser.parse_args(argv)
    logging.getLogger("tpuspec").setLevel(logging.ERROR)
    rows: list[list[object]] = [["workload", "host_call", "ms/step", "min", "max", "x none", "CPU ms/step",
                                 "x none in CPU time"]]
    for name in arguments.workloads:
        num_steps = arguments.steps or WORKLOADS[name].num_steps
        variants = {variant: prepare(name, variant) for variant in VARIANTS}
        for measure in variants.values():
            measure(5)  # compiles
        costs = interleave({variant: functools.partial(measure, min(num_steps, 50) if variant == "slow" else num_steps)
                            for variant, measure in variants.items()}, arguments.repeats)
        walls = {variant: [cost.wall * 1e3 for cost in taken] for variant, taken in costs.items()}
        cpus = {variant: [cost.cpu * 1e3 for cost in taken] for variant, taken in costs.items()}
        for variant in VARIANTS:
            wall, cpu = spread(walls[variant], 4), spread(cpus[variant], 4)
            ratio, cpu_ratio = (median_ratio(times[variant], times["none"]) for times in (walls, cpus))
            print(json.dumps({
                "benchmark": "host_call", "workload": name, "host_call": variant, "metric": "step time", "unit": "ms",
                **wall, "ratio_to_none": ratio, "cpu_ms": cpu["median"], "cpu_ratio_to_none": cpu_ratio,
                "steps": num_steps, "versions": {"torch": torch.__version__, "torch_xla": torch_xla.__version__}}),
                flush=True)
            rows.append([name, variant, wall["median"], *wall["spread"], ratio, cpu["median"], cpu_ratio])
    print(table(rows))


if __name__ == "__main__":
    main()
