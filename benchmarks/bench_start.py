"""How long from the start of a process until its first steps have run? With an empty compile cache, and a full one.

    python benchmarks/bench_start.py [--workloads mlp gpt] [--repeats 3]

Imports, model, trace, compile and six steps, beside a loop by hand on torch_xla (which has no cache on a CPU) and one
in JAX. Each is a process of its own; the repeats interleave. Prints one JSON line for each (median seconds, smallest
and largest, and the ratio to the Trainer's), then a table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from step_contenders.workloads import WORKLOADS

CONTENDERS = {"tpuspec_trainer": ", steps_per_loop=5, num_warm_up=5, steps_per_execution=1", "traced_loop": "",
              "jax_jit": ""}
FIRST_STEPS = """
import sys
sys.path.insert(0, {folder!r})
from step_contenders import {contender}
{contender}.prepare({workload!r}{options})(1)
"""


def start(contender: str, workload: str, cache: Path) -> float:
    """Returns the seconds that a process takes.

    Args:
      contender: module of step_contenders.
      workload: what it trains.
      cache: folder of compiled programs.
    """
    code = FIRST_STEPS.format(folder=str(Path(__file__).parent), contender=contender, workload=workload,
                              options=CONTENDERS[contender])
    environment = os.environ | {
        "PJRT_DEVICE": "CPU", "XDG_CACHE_HOME": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    if contender == "jax_jit":
        environment["JAX_COMPILATION_CACHE_DIR"] = str(cache / "jax")
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)
    return time.perf_counter() - begun


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["mlp", "gpt"])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args(argv)
    rows = [f"{'workload':<10}{'contender':<18}{'cache':<8}{'s':>7}{'min':>7}{'max':>7}{'x Trainer':>11}"]
    for workload in arguments.workloads:
        seconds: dict[tuple[str, str], list[float]] = {}
        for _ in range(arguments.repeats):
            for contender in CONTENDERS:
                with tempfile.TemporaryDirectory() as folder:
                    for state in ("empty", "full"):
                        seconds.setdefault((contender, state), []).append(start(contender, workload, Path(folder)))
        for (contender, state), found in seconds.items():
            median = statistics.median(found)
            ratio = median / statistics.median(seconds["tpuspec_trainer", state])
            print(json.dumps({
                "benchmark": "start", "workload": workload, "contender": contender, "cache": state,
                "metric": "time to the first steps", "unit": "s", "median": round(median, 3),
                "spread": [round(min(found), 3), round(max(found), 3)], "repeats": arguments.repeats,
                "ratio_to_trainer": round(ratio, 3)}), flush=True)
            rows.append(f"{workload:<10}{contender:<18}{state:<8}{median:>7.2f}{min(found):>7.2f}{max(found):>7.2f}"
                        f"{ratio:>11.2f}")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
