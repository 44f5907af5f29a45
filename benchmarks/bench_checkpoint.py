"""What does a checkpoint of a 50-million-parameter model cost: the training loop, the disk, and a restore?

1. lost: seconds the loop is held by one asynchronous save of a training on XLA (parameters, momenta of the same size,
   random state), beside one plain device-to-host copy of the same tensors, a synchronous save, and
   torch.distributed.checkpoint's async_save of the tensors on the host. The writing thread is waited for between saves.
2. write: bytes/s of a save, checksums and fsync included, beside torch.save and fsync.
3. restore: seconds to read it, every byte checked, beside torch.load, each with the heap given back to the system
   before, as in a process that has just started.

Contenders take turns, the first repeat is dropped. Medians, ranges, and medians of the ratios are given, with the load
of the machine. The files go below BENCH_DIR, or the folder of temporary files. One JSON line for each part.
Run: python benchmarks/bench_checkpoint.py
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from interleave import interleave, median_ratio, spread
from torch import nn

import tpuspec
from tpuspec.checkpoint.background import BackgroundSave
from tpuspec.checkpoint.manager import CheckpointManager
from tpuspec.checkpoint.policy import RetentionPolicy, SavePolicy
from tpuspec.checkpoint.state import TrainingState
from tpuspec.checkpoint.store import CheckpointStore
from tpuspec.spec.scaffold import Scaffold

NUM_TENSORS, SIDE, REPEATS = 50, 1000, 7


def seconds(fn: Callable[[], object]) -> float:
    begun = time.perf_counter()
    fn()
    return time.perf_counter() - begun


def take_turns(contenders: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Measures each in turn; the first repeat is dropped."""
    return {name: times[1:] for name, times in interleave(contenders, REPEATS + 1).items()}


def report(metric: str, times: dict[str, list[float]], **more: Any) -> None:
    print(json.dumps({"metric": metric, "unit": "s", **{name: spread(values, 4) for name, values in times.items()},
                      **more, "load": round(os.getloadavg()[0], 1), "torch": torch.__version__}), flush=True)


def model_fn(features, labels, mode, params, model, optimizer):
    loss = model(features).square().mean()
    return tpuspec.TPUEstimatorSpec(mode, loss=loss, train_op=tpuspec.CrossShardOptimizer(optimizer).minimize(loss))


def measure_loop(folder: Path) -> None:
    """Part 1: a training stands at a loop boundary, and saves again and again."""
    trainer = tpuspec.Trainer(
        model_fn, model=lambda params: nn.Sequential(*[nn.Linear(SIDE, SIDE, bias=False) for _ in range(NUM_TENSORS)]),
        optimizer=lambda model, params: torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9),
        model_dir=folder / "run", train_batch_size=8, config=tpuspec.RunConfig(
            seed=1, show_progress=False, save_checkpoints_steps=None, save_checkpoints_secs=None))
    trainer.train(lambda params: [torch.ones(8, SIDE)] * 4, max_steps=4)
    (session,) = trainer._sessions.values()
    on_device = [*session.module.state_dict().values()]
    on_device += [value for state in session.replicas[0].optimizers[""].state.values() for value in state.values()]
    on_device = [tensor for tensor in on_device if isinstance(tensor, torch.Tensor) and tensor.numel() > 1]
    num_bytes = sum(tensor.nbytes for tensor in on_device)
    store = CheckpointStore(folder / "saves")
    store.prepare()
    background = BackgroundSave()
    managers = {"async_save": CheckpointManager(store, SavePolicy(1, None), RetentionPolicy(max_to_keep=1), background),
                "sync_save": CheckpointManager(store, SavePolicy(1, None), RetentionPolicy(max_to_keep=1))}

    def save(name: str) -> float:
        took = seconds(lambda: managers[name].save(session.training_state(Scaffold()), wait=name == "sync_save"))
        background.wait()
        return took

    host = {str(i): tensor.cpu() for i, tensor in enumerate(on_device)}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def dcp_save() -> float:
        path = folder / "dcp"
        begun = time.perf_counter()
        future = dcp.async_save(host, checkpoint_id=path)
        took = time.perf_counter() - begun
        future.result()
        shutil.rmtree(path)
        return took

    times = take_turns({
        "device_to_host_copy": lambda: seconds(lambda: [tensor.cpu() for tensor in on_device]),
        "async_save": lambda: save("async_save"),
        "sync_save": lambda: save("sync_save"),
        "dcp_async_save_from_host": dcp_save})
    dist.destroy_process_group()
    report("seconds that the training loop loses by a save", times, bytes=num_bytes,
           async_save_over_copy=median_ratio(times["async_save"], times["device_to_host_copy"]))


def torch_save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    with path.open("wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())


def give_heap_back() -> None:
    ctypes.CDLL(None).malloc_trim(0)


def measure_files(folder: Path) -> None:
    """Parts 2 and 3."""
    tensors = {f"w{i}": torch.randn(SIDE, SIDE) for i in range(NUM_TENSORS)}
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    store = CheckpointStore(folder / "store")
    store.prepare()

    def our_write() -> float:
        took = seconds(lambda: store.save(TrainingState(global_step=0, model=tensors)))
        store.delete(0)
        return took

    def their_write() -> float:
        path = folder / "torch-written.pt"
        took = seconds(lambda: torch_save(tensors, path))
        path.unlink()
        return took

    times = take_turns({"write": our_write, "torch_save_fsync": their_write})
    report("seconds to write 50M float32 parameters", times, bytes=num_bytes,
           bytes_per_second=round(num_bytes / statistics.median(times["write"])),
           bytes_per_second_relative_to_torch_save_fsync=median_ratio(times["torch_save_fsync"], times["write"]))

    path, theirs = store.save(TrainingState(global_step=0, model=tensors)), folder / "torch.pt"
    torch_save(tensors, theirs)

    def fresh(fn: Callable[[], object]) -> float:
        give_heap_back()
        return seconds(fn)

    times = take_turns({
        "restore": lambda: fresh(lambda: store.load(path)),
        "torch_load": lambda: fresh(lambda: torch.load(theirs, weights_only=True))})
    report("seconds to restore 50M float32 parameters", times, bytes=num_bytes,
           relative_to_torch_load=median_ratio(times["restore"], times["torch_load"]))


def main() -> None:
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        measure_files(Path(folder))
        measure_loop(Path(folder))


if __name__ == "__main__":
    main()
