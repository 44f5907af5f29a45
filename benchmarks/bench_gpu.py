"""A captured training step on a GPU, beside the same step in eager torch, in torch.compile and in JAX by hand.

    python benchmarks/bench_gpu.py record FOLDER     here, with torch_xla: traces each workload, on a CPU
    python benchmarks/bench_gpu.py run FOLDER        on the GPU's machine, which needs jax[cuda12] and torch

The step is traced once and its program is taken along: what the engine runs on a GPU is what it runs here. Prints the
median milliseconds of a step, and how far the losses are from those of the CPU.
"""

from __future__ import annotations

import os
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step_contenders.workloads import GPT, WORKLOADS, Workload, loss_of

NUM_CHECKED = 5
MOST_BYTES = 4 << 20
NUM_REPEATS = 5

LARGE = replace(WORKLOADS["gpt"], build=lambda: GPT(width=512, num_layers=8, num_heads=8), batch_size=64, num_steps=50)
CASES: dict[str, tuple[Workload, str | None]] = {
    **{name: (replace(workload, num_steps=200), None) for name, workload in WORKLOADS.items()},
    "gpt, 25 million parameters": (LARGE, None),
    "gpt, 25 million parameters, bf16-mixed": (LARGE, "bf16-mixed"),
}


def record(workload: Workload, precision: str | None) -> dict[str, Any]:
    """Returns the program of a traced step, the inputs of one call of it, and the batches."""
    import tpuspec
    from tpuspec.engine import devices

    def model_fn(features: Any, labels: Any, mode: Any, params: Any, model: Any, optimizer: Any) -> Any:
        loss = loss_of(model(features), labels)
        return tpuspec.TPUEstimatorSpec(mode, loss=loss, train_op=tpuspec.CrossShardOptimizer(optimizer).minimize(loss))

    calls: list[dict[str, Any]] = []
    compile_program = devices.OneDevice.compile

    def noted(self: Any, program: bytes, donated: Any, given: Any, made: Any) -> Any:
        run = compile_program(self, program, donated, given, made)

        def noting(inputs: Any) -> Any:
            calls[:] = [{
                "program": program, "donated": list(donated), "values": [np.array(value) for value in inputs],
                "batch": [i for i, value in enumerate(inputs) if isinstance(value, np.ndarray) and value.ndim]}]
            return run(inputs)

        return noting

    devices.OneDevice.compile = noted  # type: ignore[method-assign]
    batches = workload.batches()
    try:
        tpuspec.Trainer(
            model_fn, model=workload.build_seeded(), model_dir=tempfile.mkdtemp(),
            optimizer=lambda module, params: workload.make_optimizer(module.parameters()),
            train_batch_size=workload.batch_size, config=tpuspec.RunConfig(
                seed=0, precision=precision, show_progress=False, save_checkpoints_secs=None,
                tpu_config=tpuspec.TPUConfig(iterations_per_loop=3)),
        ).train(lambda params: (batches[k % len(batches)] for k in range(3)), steps=3)
    finally:
        devices.OneDevice.compile = compile_program  # type: ignore[method-assign]
    last = calls[-1]
    assert len(last["batch"]) == 2, "features and labels"
    return {name: last[name] for name in ("program", "donated", "batch", "values")} | {
        "batches": [[tensor.numpy() for tensor in pair] for pair in batches]}


def light(recorded: dict[str, Any]) -> dict[str, Any]:
    """Returns a recorded step without the values of large state, which `filled` makes up: alike on every machine."""
    values = recorded["values"]
    if sum(value.nbytes for value in values) > MOST_BYTES:
        values = [(value.shape, value.dtype.name) if value.dtype == np.float32 and value.ndim else value
                  for value in values]
    return {**recorded, "values": values}


def filled(recorded: dict[str, Any]) -> dict[str, Any]:
    """Returns a recorded step with made-up values, small and positive, in place of those that were left out."""
    generator = np.random.default_rng(0)
    values = [np.abs(generator.standard_normal(value[0], np.float32)) * np.float32(0.02)
              if isinstance(value, tuple) else value for value in recorded["values"]]
    return {**recorded, "values": values}


def stepping(recorded: dict[str, Any], platform: str) -> Callable[[int], list[Any]]:
    """Returns a function that runs so many steps of a recorded program, and returns their losses."""
    import jax

    from tpuspec.engine.devices import OneDevice

    engine = OneDevice(jax.devices(platform))
    donated, batch, values = recorded["donated"], recorded["batch"], recorded["values"]
    run = engine.compile(recorded["program"], donated, [False] * len(values), [])
    inputs = engine.put([torch.from_numpy(np.array(value)) for value in values])
    # Which of the two comes first in the graph does not matter to the time; shape and dtype tell.
    order = [next(k for k in (0, 1) if recorded["batches"][0][k].shape == values[i].shape
                  and recorded["batches"][0][k].dtype == values[i].dtype
                  and (recorded["batches"][0][0].dtype != recorded["batches"][0][1].dtype or k == at))
             for at, i in enumerate(batch)]

    def steps(num_steps: int) -> list[Any]:
        losses = []
        for k in range(num_steps):
            for place, which in zip(batch, order, strict=True):
                inputs[place] = recorded["batches"][k % len(recorded["batches"])][which]
            outputs = run(inputs)
            for place, output in zip(donated, outputs, strict=False):
                inputs[place] = output
            losses.append(outputs[len(donated)])
        return losses

    return steps


def milliseconds(run: Callable[[int], Any], finish: Callable[[Any], Any], num_steps: int) -> float:
    finish(run(10))
    times = []
    for _ in range(NUM_REPEATS):
        begun = time.perf_counter()
        finish(run(num_steps))
        times.append((time.perf_counter() - begun) / num_steps * 1e3)
    return statistics.median(times)


def in_torch(workload: Workload, precision: str | None, *, compiled: bool) -> Callable[[int], Any]:
    model = workload.build_seeded().cuda()
    optimizer = workload.make_optimizer(model.parameters())
    batches = [(x.pin_memory(), y.pin_memory()) for x, y in workload.batches()]

    def forward(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=precision is not None):
            return loss_of(model(x), y)

    update: Callable[[], Any] = optimizer.step
    if compiled:
        forward, update = torch.compile(forward), torch.compile(optimizer.step)

    def steps(num_steps: int) -> torch.Tensor:
        for k in range(num_steps):
            x, y = batches[k % len(batches)]
            loss = forward(x.cuda(non_blocking=True), y.cuda(non_blocking=True))
            loss.backward()
            update()
            optimizer.zero_grad(set_to_none=True)
        return loss

    return steps


def run_case(name: str, recorded: dict[str, Any]) -> None:
    import jax

    workload, precision = CASES[name]
    losses = [float(np.mean(np.asarray(loss))) for loss in stepping(recorded, "cuda")(NUM_CHECKED)]
    expected = recorded["losses"]
    found = {"engine": milliseconds(stepping(recorded, "cuda"), jax.block_until_ready, workload.num_steps)}
    for label, compiled in (("torch eager", False), ("torch.compile", True)):
        found[label] = milliseconds(in_torch(workload, precision, compiled=compiled),
                                    lambda _: torch.cuda.synchronize(), workload.num_steps)
    if name in WORKLOADS:
        from step_contenders import jax_jit

        by_hand = jax_jit.prepare(name)
        found["JAX by hand"] = statistics.median(by_hand(workload.num_steps) for _ in range(NUM_REPEATS))
    apart = max(abs(one - other) for one, other in zip(losses, expected, strict=True))
    print(f"{name}: " + ", ".join(f"{label} {value:.3f} ms" for label, value in found.items())
          + f"; losses within {apart:.1e} of the CPU's", flush=True)


def main() -> None:
    verb, folder = sys.argv[1], Path(sys.argv[2])
    if verb == "record":
        folder.mkdir(parents=True, exist_ok=True)
        for number, (workload, precision) in enumerate(CASES.values()):
            recorded = light(record(workload, precision))
            recorded["losses"] = [float(np.mean(np.asarray(loss)))
                                  for loss in stepping(filled(recorded), "cpu")(NUM_CHECKED)]
            (folder / f"{number}.pkl").write_bytes(pickle.dumps(recorded))
            print(list(CASES)[number], recorded["losses"], flush=True)
        return
    os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu")
    import jax

    print(jax.devices()[0].device_kind, "jax", jax.__version__, "torch", torch.__version__, flush=True)
    for number, name in enumerate(CASES):
        run_case(name, filled(pickle.loads((folder / f"{number}.pkl").read_bytes())))


if __name__ == "__main__":
    main()
