"""How fast is evaluate() beside a hand-written torch_xla loop, and beside one that gathers its logits by mesh_reduce?

    python benchmarks/bench_eval.py [--workloads cnn mlp] [--repeats 7] [--batches 400]

`by_hand` traces each batch, brings logits and losses over by `.cpu()` and counts; `mesh_reduce` brings over 64x1000
logits by `xm.mesh_reduce` instead, is held against an evaluate() of as many, and runs a tenth of the batches. All run
in one process, are warm, must agree on accuracy and loss, and take turns.

An evaluate() is the whole call, from input_fn to the result with its summaries. `fixed` is what it costs besides its
batches: a call over one batch, less one batch; `per batch` is the difference of a long call and that one. CPU is the
processor time of all threads, which other work on the machine changes least; the device is a CPU here, so it is in it.
Prints one JSON line for each contender, then a table.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

os.environ.setdefault("PJRT_DEVICE", "CPU")

import torch
import torch_xla
import torch_xla.core.xla_model as xm
from interleave import Cost, interleave, median_ratio, spread, table
from step_contenders.workloads import WORKLOADS
from torch import Tensor, nn

import tpuspec

WIDE = 1000
BASELINES = {"evaluate": "by_hand", "evaluate_wide": "mesh_reduce"}

Batches = Sequence[tuple[Tensor, Tensor]]
Evaluation = Callable[[Batches], tuple[float, float]]
"""Returns accuracy and mean loss."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One contender in one repeat: a call over one batch, and one over many."""

    short: Cost
    long: Cost
    num_batches: int

    @property
    def per_batch(self) -> Cost:
        return (self.long - self.short) / (self.num_batches - 1)

    @property
    def fixed(self) -> Cost:
        return self.short - self.per_batch


def wide(module: nn.Module) -> nn.Module:
    return nn.Sequential(module, nn.Linear(10, WIDE))


def by_trainer(module: nn.Module, batch_size: int) -> Evaluation:
    def metric_fn(labels, logits):
        return {"accuracy": logits.argmax(1) == labels}

    def model_fn(features, labels, mode, params, model):
        logits = model(features)
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        return tpuspec.TPUEstimatorSpec(mode, loss=losses, eval_metrics=(metric_fn, [labels, logits]))

    trainer = tpuspec.Trainer(
        model_fn, model=module, model_dir=tempfile.mkdtemp(), train_batch_size=batch_size, eval_batch_size=batch_size,
        config=tpuspec.RunConfig(seed=0, show_progress=False))

    def run(batches: Batches) -> tuple[float, float]:
        result = trainer.evaluate(lambda params: iter(batches))
        return result["accuracy"], result["loss"]

    return run


def by_loop(module: nn.Module, bring: Callable[[Tensor], Tensor]) -> Evaluation:
    device = torch_xla.device()
    module = module.to(device).eval()

    def run(batches: Batches) -> tuple[float, float]:
        correct, losses, rows = 0, 0.0, 0
        with torch.no_grad():
            for features, labels in batches:
                logits = module(features.to(device))
                loss = nn.functional.cross_entropy(logits, labels.to(device), reduction="none")
                torch_xla.sync()
                correct += int((bring(logits).argmax(1) == labels).sum())
                losses += float(loss.cpu().sum())
                rows += len(labels)
        return correct / rows, losses / rows

    return run


def check_agreement(runs: dict[str, Evaluation], batches: Batches) -> None:
    """Compiles all, and checks that each contender computes what its baseline does."""
    results = {name: run(batches) for name, run in runs.items()}
    for name, baseline in BASELINES.items():
        (accuracy, loss), (other_accuracy, other_loss) = results[name], results[baseline]
        if accuracy != other_accuracy or not math.isclose(loss, other_loss, rel_tol=1e-5):
            raise SystemExit(f"{name} and {baseline} disagree: {results[name]}, {results[baseline]}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=("mlp", "cnn"), default=["cnn"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batches", type=int, default=400)
    arguments = parser.parse_args(argv)
    logging.getLogger("tpuspec").setLevel(logging.ERROR)
    rows: list[list[object]] = [["workload", "contender", "rows/s", "x baseline", "x in CPU time", "ms per batch",
                                 "CPU ms per batch", "fixed ms", "batches"]]
    for name in arguments.workloads:
        workload = WORKLOADS[name]
        made, size = workload.batches(), workload.batch_size
        runs = {
            "evaluate": by_trainer(workload.build_seeded(), size),
            "by_hand": by_loop(workload.build_seeded(), lambda logits: logits.cpu()),
            "evaluate_wide": by_trainer(wide(workload.build_seeded()), size),
            "mesh_reduce": by_loop(wide(workload.build_seeded()),
                                   lambda logits: xm.mesh_reduce("logits", logits.cpu(), torch.cat)),
        }
        for _ in range(3):  # the third call replays
            check_agreement(runs, made)

        def measure(key: str) -> Measured:
            count = max(2, arguments.batches // 10 if key == "mesh_reduce" else arguments.batches)
            batches = [made[k % len(made)] for k in range(count)]  # noqa: B023 - called in this turn
            return Measured(short=Cost.of(lambda: runs[key](batches[:1])),  # noqa: B023
                            long=Cost.of(lambda: runs[key](batches)), num_batches=count)  # noqa: B023

        measured = interleave({key: lambda key=key: measure(key) for key in runs}, arguments.repeats)
        rates = {key: [size * m.num_batches / m.long.wall for m in values] for key, values in measured.items()}
        cpu_rates = {key: [size * m.num_batches / m.long.cpu for m in values] for key, values in measured.items()}
        for key, values in measured.items():
            line = {"benchmark": "eval", "workload": name, "contender": key, "metric": "rate", "unit": "rows/s",
                    **spread(rates[key], 0), "batches": values[0].num_batches, "batch_size": size}
            for part, costs in (("per_batch", [m.per_batch for m in values]), ("fixed", [m.fixed for m in values])):
                line[f"{part}_ms"] = round(statistics.median(cost.wall for cost in costs) * 1e3, 3)
                line[f"{part}_cpu_ms"] = round(statistics.median(cost.cpu for cost in costs) * 1e3, 3)
            ratios: list[object] = [None, None]
            if key in BASELINES:
                base = BASELINES[key]
                ratios = [median_ratio(rates[key], rates[base]), median_ratio(cpu_rates[key], cpu_rates[base])]
                line |= {f"ratio_to_{base}": ratios[0], f"cpu_ratio_to_{base}": ratios[1]}
            line["versions"] = {"torch": torch.__version__, "torch_xla": torch_xla.__version__}
            print(json.dumps(line), flush=True)
            rows.append([name, key, int(line["median"]), *ratios, line["per_batch_ms"], line["per_batch_cpu_ms"],
                         line["fixed_ms"], line["batches"]])
    print(table(rows))


if __name__ == "__main__":
    main()
