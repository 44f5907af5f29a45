"""What does a host_call cost a training step: none, a small one, 64x1000 floats, each on every step, and a slow one?

    python benchmarks/bench_host_call.py [--workloads gpt cnn mlp] [--repeats 5] [--steps N]

All variants train the same network in one process, and their repeats interleave. The baseline, `none`, only drains its
loss. Prints one JSON line for each variant (median milliseconds per step, smallest and largest, median ratio to the
baseline of the same repeat). `slow` sleeps 20 ms a step: there the host is the limit, and the step must take that long.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

os.environ.setdefault("PJRT_DEVICE", "CPU")

import torch
import torch_xla
from step_contenders.workloads import WORKLOADS, loss_of

import tpuspec

VARIANTS = ("none", "small", "large", "slow")
SLEEP_SECONDS = 0.02
LARGE = (64, 1000)


class Stopwatch(tpuspec.SessionRunHook):
    def __init__(self) -> None:
        self.loop_starts: list[float] = []
        self.end_time = 0.0

    def before_run(self, context):
        self.loop_starts.append(time.perf_counter())

    def end(self, context):  # all host work is done by now
        self.end_time = time.perf_counter()


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


def prepare(workload_name: str, variant: str) -> Callable[[int], float]:
    workload = WORKLOADS[workload_name]
    batches = workload.batches()
    loop_length = min(50, workload.num_steps)
    trainer = tpuspec.Trainer(
        model_fn_of(variant), model=workload.build_seeded(),
        optimizer=lambda module, params: workload.make_optimizer(module.parameters()),
        model_dir=tempfile.mkdtemp(), train_batch_size=workload.batch_size,
        config=tpuspec.RunConfig(seed=0, show_progress=False, save_checkpoints_secs=None,
                                 tpu_config=tpuspec.TPUConfig(iterations_per_loop=loop_length)))

    def measure(num_steps: int) -> float:
        stopwatch, total = Stopwatch(), loop_length + num_steps
        trainer.train(lambda params: (batches[k % len(batches)] for k in range(total)), hooks=[stopwatch], steps=total)
        return (stopwatch.end_time - stopwatch.loop_starts[1]) / num_steps * 1e3

    return measure


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["gpt", "cnn", "mlp"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int)
    arguments = parser.parse_args(argv)
    logging.getLogger("tpuspec").setLevel(logging.ERROR)
    for name in arguments.workloads:
        num_steps = arguments.steps or WORKLOADS[name].num_steps
        measures = {variant: prepare(name, variant) for variant in VARIANTS}
        for measure in measures.values():
            measure(5)  # compiles
        times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for _ in range(arguments.repeats):
            for variant, measure in measures.items():
                times[variant].append(measure(min(num_steps, 100) if variant == "slow" else num_steps))
        for variant, values in times.items():
            ratio = statistics.median(own / none for own, none in zip(values, times["none"], strict=True))
            print(json.dumps({
                "benchmark": "host_call", "workload": name, "host_call": variant, "metric": "step time", "unit": "ms",
                "median": round(statistics.median(values), 4), "spread": [round(min(values), 4), round(max(values), 4)],
                "ratio_to_none": round(ratio, 3), "repeats": arguments.repeats,
                "versions": {"torch": torch.__version__, "torch_xla": torch_xla.__version__}}), flush=True)


if __name__ == "__main__":
    main()
