"""How fast is evaluate() beside a hand-written torch_xla loop, and beside one that gathers its logits by mesh_reduce?

    python benchmarks/bench_eval.py [--workloads cnn] [--repeats 5] [--batches 200]

`by_hand` traces each batch, brings the logits over by `.cpu()` and counts; `mesh_reduce` brings over 64x1000 logits by
`xm.mesh_reduce` instead, and is held against an evaluate() of as many. All run in one process, and their repeats
interleave; evaluate() includes its whole call, from input_fn to the result. Prints one JSON line for each.
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
import torch_xla.core.xla_model as xm
from step_contenders.workloads import WORKLOADS
from torch import Tensor, nn

import tpuspec

WIDE = 1000


def wide(module: nn.Module) -> nn.Module:
    return nn.Sequential(module, nn.Linear(10, WIDE))


def by_trainer(module: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    def metric_fn(labels, logits):
        return {"accuracy": logits.argmax(1) == labels}

    def model_fn(features, labels, mode, params, model):
        logits = model(features)
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        return tpuspec.TPUEstimatorSpec(mode, loss=losses, eval_metrics=(metric_fn, [labels, logits]))

    size = len(batches[0][1])
    trainer = tpuspec.Trainer(
        model_fn, model=module, model_dir=tempfile.mkdtemp(), train_batch_size=size, eval_batch_size=size,
        config=tpuspec.RunConfig(seed=0, show_progress=False))
    return lambda: trainer.evaluate(lambda params: iter(batches)) and None


def by_loop(module: nn.Module, batches: list[tuple[Tensor, Tensor]],
            bring: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    device = torch_xla.device()
    module = module.to(device).eval()

    def run() -> None:
        correct, losses = 0, 0.0
        with torch.no_grad():
            for features, labels in batches:
                logits = module(features.to(device))
                loss = nn.functional.cross_entropy(logits, labels.to(device), reduction="none")
                torch_xla.sync()
                correct += int((bring(logits).argmax(1) == labels).sum())
                losses += float(loss.cpu().sum())

    return run


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=("mlp", "cnn"), default=["cnn"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=200)
    arguments = parser.parse_args(argv)
    logging.getLogger("tpuspec").setLevel(logging.ERROR)
    for name in arguments.workloads:
        workload = WORKLOADS[name]
        made = workload.batches()
        batches = [made[k % len(made)] for k in range(arguments.batches)]
        runs = {
            "evaluate": by_trainer(workload.build_seeded(), batches),
            "by_hand": by_loop(workload.build_seeded(), batches, lambda logits: logits.cpu()),
            "evaluate_wide": by_trainer(wide(workload.build_seeded()), batches),
            "mesh_reduce": by_loop(wide(workload.build_seeded()), batches,
                                   lambda logits: xm.mesh_reduce("logits", logits.cpu(), torch.cat)),
        }
        for run in runs.values():
            run()  # compiles
        rates: dict[str, list[float]] = {key: [] for key in runs}
        for _ in range(arguments.repeats):
            for key, run in runs.items():
                begun = time.perf_counter()
                run()
                rates[key].append(len(batches) * workload.batch_size / (time.perf_counter() - begun))
        baselines = {"evaluate": "by_hand", "evaluate_wide": "mesh_reduce"}
        for key, values in rates.items():
            line = {"benchmark": "eval", "workload": name, "contender": key, "metric": "rate", "unit": "rows/s",
                    "median": round(statistics.median(values)), "spread": [round(min(values)), round(max(values))],
                    "repeats": arguments.repeats}
            if key in baselines:
                base = rates[baselines[key]]
                line[f"ratio_to_{baselines[key]}"] = round(statistics.median(
                    own / other for own, other in zip(values, base, strict=True)), 3)
            line["versions"] = {"torch": torch.__version__, "torch_xla": torch_xla.__version__}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
