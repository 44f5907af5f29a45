"""How fast is a checkpoint of 50 million parameters written and read, beside torch.save followed by fsync?

Each repeat measures both into new files, in turns of order; the first repeat is dropped. One JSON line: seconds (median
and range), bytes/s with checksums included, and the ratio of each repeat. Run: python benchmarks/bench_checkpoint.py
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tpuspec.checkpoint.state import TrainingState
from tpuspec.checkpoint.store import CheckpointStore

NUM_TENSORS, SIDE, REPEATS = 50, 1000, 12


def seconds(fn: Callable[[], object]) -> float:
    begun = time.perf_counter()
    fn()
    return time.perf_counter() - begun


def torch_save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    with path.open("wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())


def main() -> None:
    tensors = {f"w{i}": torch.randn(SIDE, SIDE) for i in range(NUM_TENSORS)}
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    times: dict[str, list[float]] = {"write": [], "torch_save_fsync": [], "read": [], "torch_load": []}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        store = CheckpointStore(folder)
        store.prepare()
        for step in range(REPEATS + 1):
            theirs = Path(folder) / f"torch-{step}.pt"
            state = TrainingState(global_step=step, model=tensors)
            writes: list[tuple[str, Callable[[], object]]] = [
                ("write", lambda state=state: store.save(state)),
                ("torch_save_fsync", lambda path=theirs: torch_save(tensors, path))]
            # Who writes first pays for the deletions of the repeat before: by turns.
            found = {name: seconds(fn) for name, fn in (writes if step % 2 else writes[::-1])}
            found["read"] = seconds(lambda step=step: store.load(store.path(step)))
            found["torch_load"] = seconds(lambda path=theirs: torch.load(path, weights_only=True))
            store.delete(step)
            theirs.unlink()
            if step:
                for name, value in found.items():
                    times[name].append(value)
    ratios = [theirs / ours for ours, theirs in zip(times["write"], times["torch_save_fsync"], strict=True)]
    print(json.dumps({
        "metric": "checkpoint of 50M float32 parameters", "unit": "s", "repeats": REPEATS, "bytes": num_bytes,
        **{name: {"median": round(statistics.median(values), 4),
                  "range": [round(min(values), 4), round(max(values), 4)]} for name, values in times.items()},
        "write_bytes_per_second": round(num_bytes / statistics.median(times["write"])),
        "bytes_per_second_relative_to_torch_save_fsync": {
            "median": round(statistics.median(ratios), 2), "range": [round(min(ratios), 2), round(max(ratios), 2)]},
        "torch": torch.__version__}))


if __name__ == "__main__":
    main()
