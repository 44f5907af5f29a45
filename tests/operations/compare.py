# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
"""Compares all of torch's operations on XLA with the CPU, and writes the table of docs/operations.md.

    make operations                                 all, in a quarter of an hour or so
    make operations ARGS="--only celu --print"      what one operation does
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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
