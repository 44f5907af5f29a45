"""What does a training step cost at 1, 2, 4 and 8 replicas of one process on XLA:CPU?

    python benchmarks/bench_replicas.py [--replicas 1 2 4 8] [--workload mlp] [--repeats 5] [--steps 200]

The global batch stays the same, so that each replica has a share of it; what the time grows by is the cost of driving
more replicas and of their all-reduce. Each number of replicas has a process of its own, and the repeats interleave.
Prints one JSON line for each (median milliseconds per step, smallest and largest), then a table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench_step import TRAINER, Worker, interleave
from step_contenders.workloads import WORKLOADS


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--workload", choices=WORKLOADS, default="mlp")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args(argv)
    rows = []
    with contextlib.ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = []
        for num_replicas in arguments.replicas:
            worker = Worker(TRAINER, logs / f"{num_replicas}.log", "--replicas", str(num_replicas))
            stack.callback(worker.close)
            workers.append(worker)
        measured = interleave(workers, arguments.workload, num_steps=arguments.steps, repeats=arguments.repeats)
        for num_replicas, result in zip(arguments.replicas, measured, strict=True):
            median = statistics.median(result.times)
            rows.append(f"{num_replicas:>8}{median:>10.3f}{min(result.times):>10.3f}{max(result.times):>10.3f}"
                        f"{result.ratio_to(measured[0]):>9.2f}")
            print(json.dumps({
                "benchmark": "replicas", "workload": arguments.workload, "replicas": num_replicas,
                "metric": "step time", "unit": "ms", "median": round(median, 4),
                "spread": [round(min(result.times), 4), round(max(result.times), 4)], "repeats": arguments.repeats,
                "steps": arguments.steps, "versions": result.versions}), flush=True)
    print("\n".join([f"{'replicas':>8}{'ms/step':>10}{'min':>10}{'max':>10}{'x first':>9}", *rows]))


if __name__ == "__main__":
    main()
