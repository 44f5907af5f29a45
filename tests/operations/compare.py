"""Compares all of torch's operations on XLA with the CPU, and writes the table of docs/operations.md.

    make operations                            all, in a quarter of an hour or so
    make operations ARGS="celu nn.functional.celu --dtypes float32"     what some do; writes nothing
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.operations import samples, table

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "operations.md"
SAMPLES = Path(__file__).with_name("samples.py")
SECONDS_WITHOUT_RESULT = 240


def compare(variants: list[tuple[int, str]], results: Path, *, at_most_seconds: float = 3600) -> list[dict[str, Any]]:
    """Runs variants in processes of their own, each as far as it comes; returns one result a variant."""
    left = [tuple(variant) for variant in variants]
    done: dict[tuple[int, str], dict[str, Any]] = {}
    end = time.monotonic() + at_most_seconds
    while left and time.monotonic() < end:
        _run_process(left, results, end)
        lines = [json.loads(line) for line in results.read_text().splitlines()]
        done.update({tuple(line["variant"]): line for line in lines if "variant" in line})
        last = tuple(lines[-1]["begin"]) if lines and "begin" in lines[-1] else None
        if last is not None and last not in done:
            done[last] = {"variant": list(last), "outcome": "ended the process", "why": ""}
            with results.open("a") as file:
                file.write(json.dumps(done[last]) + "\n")
        left = [variant for variant in left if variant not in done]
    return [done[tuple(variant)] for variant in variants if tuple(variant) in done]


def _run_process(variants: list[tuple[int, str]], results: Path, end: float) -> None:
    environment = {**os.environ, "PJRT_DEVICE": "CPU", "NPROC": "32"}
    with tempfile.TemporaryFile("w+") as lines:
        lines.writelines(json.dumps(variant) + "\n" for variant in variants)
        lines.seek(0)
        results.touch()
        process = subprocess.Popen([sys.executable, str(SAMPLES), str(results)], stdin=lines, env=environment,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        size, since = -1, time.monotonic()
        try:
            while process.poll() is None and time.monotonic() < end:
                if results.stat().st_size != size:
                    size, since = results.stat().st_size, time.monotonic()
                if time.monotonic() - since > SECONDS_WITHOUT_RESULT:
                    break
                time.sleep(0.2)
        finally:
            process.kill()
            process.wait()


def main() -> None:
    """Compares, and writes the table, or prints what the named operations do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operations", nargs="*", help="names of op_db, with or without their variant")
    parser.add_argument("--dtypes", nargs="*", default=samples.DTYPES)
    parser.add_argument("--results", type=Path, help="a file for the results, as JSON")
    arguments = parser.parse_args()
    chosen = [(number, dtype) for number, dtype in samples.variants() if dtype in arguments.dtypes and (
        not arguments.operations or not {samples.op_db[number].name, samples.name_of(samples.op_db[number])}.isdisjoint(
            arguments.operations))]
    with tempfile.TemporaryDirectory() as folder:
        results = compare(chosen, Path(folder) / "results")
    for result in results:
        result["name"] = samples.name_of(samples.op_db[result["variant"][0]])
    if arguments.results:
        arguments.results.write_text(json.dumps(results))
    if arguments.operations:
        for result in results:
            print(result["name"], result["variant"][1], result["outcome"], result["why"], sep=", ")
    elif len(results) == len(chosen):
        TABLE.write_text(table.page(results))
    sys.exit(len(results) < len(chosen) or any(result["outcome"] in table.FAULTS for result in results))


if __name__ == "__main__":
    main()
