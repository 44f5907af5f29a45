"""Processes x devices x layouts x recipes, each held to one process: `python -m tests.hosts.matrix` runs all of it.

Losses and weights within 1e-5 of one process (one device, or as many replicas as the cell has), evaluation of 101 rows,
predictions in order; a resume on the same layout bit for bit, and one from the reference's checkpoint within 1e-5.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.hosts.conftest import Outcome, runs, zygote_process
from tests.hosts.recipe_job import RECIPES, ROWS, SAVED, STEPS, tpu_settings

LAYOUTS = ("replicas", "data", "data x model", "fsdp")


class Cell(NamedTuple):
    """One run of the matrix; `devices` are those of a process."""

    processes: int
    devices: int
    layout: str
    recipe: str

    def __str__(self) -> str:
        return f"{self.processes}x{self.devices} {self.layout} {self.recipe}"


def cells() -> list[Cell]:
    """Returns those that can be: a data axis must be a multiple of the processes."""
    return [Cell(processes, devices, layout, recipe) for recipe in RECIPES for processes in (1, 2, 4)
            for devices in (1, 2) for layout in LAYOUTS
            if processes * devices > 1 and not (layout == "data x model" and devices == 1)]


class Matrix:
    """Runs cells, and keeps the references that they are held to.

    Args:
      run: starts the processes of a job.
    """

    def __init__(self, run: Callable[..., Outcome]) -> None:
        self._run = run
        self._reference = functools.lru_cache(self._run_reference)

    def differences(self, cell: Cell) -> list[str]:
        """Runs a cell; returns what is not as in the reference, nothing where all is right."""
        reference = self._reference(cell.recipe, cell.processes * cell.devices if cell.layout == "replicas" else 1)
        (expected,) = (result["whole"] for result in reference.results())
        outcome = self._of(cell.processes, cell.devices, "whole,resume,other", cell.recipe, cell.layout,
                           begin=str(reference.out / "whole"))
        found = []

        def hold(name: str, is_right: bool) -> None:
            if not is_right:
                found.append(name)

        results = outcome.results()
        chief = results[0]["whole"]
        hold("losses", len(chief["losses"]) == STEPS and _far(chief["losses"], expected["losses"]) < 1e-5)
        hold("metrics", _far(chief["metrics"], expected["metrics"]) < 1e-5)
        hold("accuracy", chief["metrics"].get("accuracy") == expected["metrics"].get("accuracy"))
        if "predictions" in expected:
            hold("predictions", len(chief["predictions"]) == ROWS and _far(
                chief["predictions"], expected["predictions"]) < 1e-5)
        for host, result in enumerate(results):
            hold(f"weights of {host}: {_far(result['whole']['weights'], expected['weights']):.1e}",
                 _far(result["whole"]["weights"], expected["weights"]) < 1e-5)
            hold(f"resume on {host}", result["resume"]["weights"] == result["whole"]["weights"])
            hold(f"other on {host}: {_far(result['other']['weights'], expected['weights']):.1e}",
                 _far(result["other"]["weights"], expected["weights"]) < 1e-5)
            hold(f"step of {host}", {part["step"] for part in result.values()} == {STEPS})
            hold(f"metrics of {host}", result["whole"]["metrics"] == chief["metrics"])
        has_pieces = (outcome.out / "whole" / f"checkpoint-{SAVED}" / "index.json").exists()
        hold("files", has_pieces == (cell.processes > 1 and cell.layout != "replicas"))
        return found

    def _run_reference(self, recipe: str, num_replicas: int) -> Outcome:
        layout = "replicas" if num_replicas > 1 else "one"
        return self._of(1, num_replicas, "whole", recipe, layout)

    def _of(self, processes: int, devices: int, job: str, recipe: str, layout: str, **options: str) -> Outcome:
        tpu = {} if layout == "one" else tpu_settings(recipe, layout, processes * devices)
        return self._run(processes, job, kind="recipe", recipe=recipe, tpu=json.dumps(tpu), environment={
            "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(devices), "NPROC": "32"}, **options)


def _far(one: object, other: object) -> float:
    """Returns the largest difference between two trees of numbers of one form."""
    if isinstance(one, dict) and isinstance(other, dict):
        return max((_far(one[key], other[key]) for key in one), default=0.0) if one.keys() == other.keys() else np.inf
    a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return float(np.abs(a - b).max(initial=0.0)) if a.shape == b.shape else np.inf


def main() -> int:
    """Runs the whole matrix, or the cells whose text holds every word of the command line."""
    wrong = 0
    chosen = [cell for cell in cells() if all(word in str(cell) for word in sys.argv[1:])]
    with tempfile.TemporaryDirectory() as folder, zygote_process(TEST_ZYGOTE="xla") as process:
        matrix = Matrix(runs(process, Path(folder)))
        for cell in chosen:
            begun = time.monotonic()
            try:
                found = matrix.differences(cell)
            except AssertionError as error:
                found = [f"failed: {error}"]
            wrong += bool(found)
            print(f"{cell!s:<28} {time.monotonic() - begun:6.1f} s  {'; '.join(found) or 'right'}", flush=True)
    print(f"{len(chosen)} cells, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
