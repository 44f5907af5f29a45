"""One contender in a process of its own, which measures on command: `python worker.py CONTENDER [--replicas N]`.

Answers with lines of JSON: first {"ready": versions} or {"missing": reason}; then, for each line of its input, which is
{"workload": name, "steps": number}, {"ms": milliseconds per step} or {"error": text}. Ends with its input.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def serve(contender: str, **options: int) -> None:
    # Whatever else prints, prints to stderr: stdout carries the answers.
    answers, sys.stdout = os.fdopen(os.dup(1), "w", buffering=1), sys.stderr
    os.dup2(2, 1)
    sys.path[0:0] = [str(ROOT), str(ROOT / "benchmarks")]
    module = importlib.import_module(f"step_contenders.{contender}")
    missing = [name for name in module.NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        print(json.dumps({"missing": f"{' and '.join(missing)} not installed: pip install 'tpuspec[bench]'"}),
              file=answers)
        return
    print(json.dumps({"ready": {name: importlib.metadata.version(name) for name in module.NEEDS}}), file=answers)
    prepared: dict[str, Callable[[int], float]] = {}
    for line in sys.stdin:
        command = json.loads(line)
        try:
            name = command["workload"]
            if name not in prepared:
                prepared[name] = module.prepare(name, **options)
            answer = {"ms": prepared[name](command["steps"])}
        except Exception as error:
            traceback.print_exception(error)
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("contender")
    parser.add_argument("--replicas", type=int, default=None)
    arguments = parser.parse_args()
    serve(arguments.contender, **({} if arguments.replicas is None else {"num_replicas": arguments.replicas}))
