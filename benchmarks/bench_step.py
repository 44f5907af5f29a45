"""What does one training step cost in tpuspec, a traced torch_xla loop, JAX, Lightning and Accelerate, on one device?

    python benchmarks/bench_step.py [--workloads mlp cnn gpt convnet] [--contenders ...] [--repeats 5] [--steps N]
                                    [--plot step.png]

Each contender has a process of its own, which waits until it is told to measure, so that the repeats of all contenders
interleave: what slows the machine slows all of them. Warm-up is left out. Prints one JSON line for each contender and
workload (median milliseconds per step, smallest and largest), then a table. A ratio is the median over the repeats of
the contender's time to the Trainer's in the same repeat: above 1, the Trainer is faster.

The traced loop takes part twice: with AdamW(capturable=True), which has the Trainer's bits, and as torch makes AdamW,
which traces fewer operations. So does the Trainer: as it is set for each workload, and with steps_per_execution=1.
JAX, Lightning and Accelerate take part where they are installed:
pip install 'tpuspec[bench]'.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step_contenders.workloads import WORKLOADS

TRAINER = "tpuspec_trainer"
CONTENDERS = (TRAINER, "tpuspec_trainer_single", "traced_loop_capturable", "traced_loop", "jax_jit", "lightning_xla",
              "accelerate_xla")
WORKER = Path(__file__).parent / "step_contenders" / "worker.py"


class WorkerError(RuntimeError):
    """A contender failed; its own output says more."""


class Worker:
    """A contender's process.

    Args:
      contender: name of its module in step_contenders.
      log: file for what it prints.
      options: further arguments of worker.py.

    Attributes:
      versions: of the packages it measures.
      missing: why it cannot take part; None where it can.
    """

    def __init__(self, contender: str, log: Path, *options: str) -> None:
        self.contender, self._log = contender, log
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(WORKER), contender, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=output, text=True, env={"PJRT_DEVICE": "CPU", **os.environ})
        answer = self._answer()
        self.versions: dict[str, str] = answer.get("ready", {})
        self.missing: str | None = answer.get("missing")

    def measure(self, workload: str, num_steps: int) -> float:
        """Returns milliseconds per step."""
        assert self._process.stdin is not None
        print(json.dumps({"workload": workload, "steps": num_steps}), file=self._process.stdin, flush=True)
        return self._answer()["ms"]

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": "its process ended"}
        if "error" in answer:
            last_lines = "".join(self._log.read_text(errors="replace").splitlines(keepends=True)[-15:])
            raise WorkerError(f"{self.contender}: {answer['error']}\n{last_lines}")
        return answer


def start_workers(contenders: Iterable[str], stack: contextlib.ExitStack) -> list[Worker]:
    """Starts the contenders that can take part, until the stack is closed; prints why the others cannot."""
    logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    workers = []
    for contender in contenders:
        worker = Worker(contender, logs / f"{contender}.log")
        stack.callback(worker.close)
        if worker.missing is None:
            workers.append(worker)
        else:
            print(f"{contender} takes no part: {worker.missing}", flush=True)
    return workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One contender's repeats of one workload, milliseconds per step; repeat i of all contenders belong together."""

    workload: str
    contender: str
    times: Sequence[float]
    num_steps: int
    versions: dict[str, str]

    def ratio_to(self, other: Measured) -> float:
        return statistics.median(own / theirs for own, theirs in zip(self.times, other.times, strict=True))

    def line(self, trainer: Measured | None) -> str:
        values: dict[str, Any] = {
            "benchmark": "step", "workload": self.workload, "contender": self.contender, "metric": "step time",
            "unit": "ms", "median": round(statistics.median(self.times), 4),
            "spread": [round(min(self.times), 4), round(max(self.times), 4)], "repeats": len(self.times),
            "steps": self.num_steps, "versions": self.versions}
        if trainer is not None:
            values["ratio_to_trainer"] = round(self.ratio_to(trainer), 3)
        return json.dumps(values)


def interleave(workers: Sequence[Worker], workload: str, *, num_steps: int, repeats: int) -> list[Measured]:
    """Measures a workload in every worker, `repeats` times; each repeat begins with another worker."""
    times: list[list[float]] = [[] for _ in workers]
    for worker in workers:
        worker.measure(workload, num_steps)  # builds, compiles, and warms up
    for repeat in range(repeats):
        for i in range(len(workers)):
            chosen = (repeat + i) % len(workers)
            times[chosen].append(workers[chosen].measure(workload, num_steps))
    return [Measured(workload=workload, contender=worker.contender, times=times[i], num_steps=num_steps,
                     versions=worker.versions) for i, worker in enumerate(workers)]


def table(results: Iterable[Measured], trainer: str = TRAINER) -> str:
    """Returns the medians, and each contender's ratio to the Trainer, as lines for people."""
    results = list(results)
    trainers = {result.workload: result for result in results if result.contender == trainer}
    lines = [f"{'workload':<10}{'contender':<24}{'ms/step':>10}{'min':>10}{'max':>10}{'x Trainer':>11}"]
    for result in results:
        base = trainers.get(result.workload)
        ratio = "" if base is None else f"{result.ratio_to(base):.2f}"
        lines.append(f"{result.workload:<10}{result.contender:<24}{statistics.median(result.times):>10.3f}"
                     f"{min(result.times):>10.3f}{max(result.times):>10.3f}{ratio:>11}")
    return "\n".join(lines)


def plot(results: Iterable[Measured], path: Path) -> None:
    """Draws each contender's median as bars, one group a workload, with the spread, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = list(results)
    workloads = list(dict.fromkeys(result.workload for result in results))
    contenders = list(dict.fromkeys(result.contender for result in results))
    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    width = 0.85 / len(contenders)
    for number, contender in enumerate(contenders):
        own = [result for result in results if result.contender == contender]
        medians = [statistics.median(result.times) for result in own]
        spread = [[median - min(result.times) for median, result in zip(medians, own, strict=True)],
                  [max(result.times) - median for median, result in zip(medians, own, strict=True)]]
        places = [workloads.index(result.workload) + (number - (len(contenders) - 1) / 2) * width for result in own]
        axes.bar(places, medians, width, yerr=spread, label=contender, error_kw={"linewidth": 0.8})
    axes.set_xticks(range(len(workloads)), workloads)
    axes.set_yscale("log")
    axes.set_ylabel("ms per training step")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=None, help="of one measurement; default: by workload")
    parser.add_argument("--plot", type=Path, default=None, help="a picture of the medians, such as step.png")
    arguments = parser.parse_args(argv)
    results: list[Measured] = []
    with contextlib.ExitStack() as stack:
        workers = start_workers(arguments.contenders, stack)
        if not workers:
            return
        for name in arguments.workloads:
            measured = interleave(workers, name, num_steps=arguments.steps or WORKLOADS[name].num_steps,
                                  repeats=arguments.repeats)
            trainer = next((m for m in measured if m.contender == TRAINER), None)
            for result in measured:
                print(result.line(trainer), flush=True)
            results += measured
    print(table(results))
    if arguments.plot is not None:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
