"""How much memory does training hold, beside JAX by hand and beside what XLA says that the step needs?

    python benchmarks/bench_memory.py [--width 3072] [--layers 4] [--rows 32] [--repeats 3]

A deep perceptron with AdamW, whose state is hundreds of megabytes, is trained on one CPU device, in a process of its
own for each contender. The memory of the process is sampled while steps run, between two boundaries of the loop; what
it had before the model was built, after a training of a tiny one, is subtracted. The smallest sample is what is held
between steps, the largest is a step's peak. No audit falls among these steps: a step that is traced again to be
checked holds the state once more meanwhile. XLA's own count is that of the step by hand in JAX: its inputs, the outputs
that do not lie where inputs lay, and temporaries. Prints one JSON line for each contender, then a table.
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
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil

CONTENDERS = ("tpuspec", "jax")
SAMPLE_SECONDS = 0.005
NUM_STEPS, FIRST_SAMPLED, LAST_SAMPLED = 64, 40, 56
MIB = 1 << 20


class Samples:
    """The memory of this process over the steps that are sampled."""

    def __init__(self) -> None:
        self._process, self._is_on, self._is_over = psutil.Process(), False, False
        self.values: list[int] = []

    def at_step(self, number: int) -> None:
        """Samples from one step to another."""
        self._is_on = FIRST_SAMPLED <= number < LAST_SAMPLED

    def now(self) -> int:
        """Returns bytes."""
        return self._process.memory_info().rss

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Takes samples on a thread within the block."""
        thread = threading.Thread(target=self._work)
        thread.start()
        try:
            yield
        finally:
            self._is_over = True
            thread.join()

    def _work(self) -> None:
        while not self._is_over:
            if self._is_on:
                self.values.append(self.now())
            time.sleep(SAMPLE_SECONDS)


def batch_of(width: int, rows: int) -> tuple[Any, Any]:
    import numpy as np

    generator = np.random.default_rng(0)
    return generator.standard_normal((rows, width), np.float32), generator.integers(0, 10, rows)


def train_tpuspec(width: int, layers: int, rows: int, at_step: Callable[[int], None]) -> dict[str, int]:
    import torch
    from torch import nn

    import tpuspec

    x, y = map(torch.from_numpy, batch_of(width, rows))

    def model_fn(features, labels, mode, params, model, optimizer):
        loss = nn.functional.cross_entropy(model(features), labels)
        return tpuspec.TPUEstimatorSpec(
            mode, loss=loss, train_op=tpuspec.CrossShardOptimizer(optimizer).minimize(loss))

    def input_fn(params):
        for number in range(NUM_STEPS):
            at_step(number)
            yield x, y

    def build(params):
        hidden = [module for _ in range(layers) for module in (nn.Linear(width, width), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(width, 10))

    tpuspec.Trainer(
        model_fn, model=build, optimizer=lambda model, params: torch.optim.AdamW(model.parameters(), lr=1e-4),
        train_batch_size=rows, model_dir=tempfile.mkdtemp(),
        config=tpuspec.RunConfig(
            seed=0, show_progress=False, save_checkpoints_secs=None, prefetch_batches=0,
            tpu_config=tpuspec.TPUConfig(iterations_per_loop=NUM_STEPS))).train(input_fn, max_steps=NUM_STEPS)
    return {}


def train_jax(width: int, layers: int, rows: int, at_step: Callable[[int], None]) -> dict[str, int]:
    import jax
    import jax.numpy as jnp
    import optax

    x, y = batch_of(width, rows)
    optimizer = optax.adamw(1e-4, weight_decay=1e-2)
    sizes = [(width, width)] * layers + [(width, 10)]

    def loss_of(params, x, y):
        for i, (weight, bias) in enumerate(params):
            x = x @ weight + bias
            x = jax.nn.relu(x) if i < layers else x
        return optax.softmax_cross_entropy_with_integer_labels(x, y).mean()

    def step(params, state, x, y):
        loss, gradients = jax.value_and_grad(loss_of)(params, x, y)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = [(jax.random.normal(jax.random.key(i), size) * size[0] ** -0.5, jnp.zeros(size[1]))
              for i, size in enumerate(sizes)]
    state = optimizer.init(params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, x, y.astype("int32")).compile()
    for number in range(NUM_STEPS):
        at_step(number)
        params, state, loss = compiled(params, state, x, y.astype("int32"))
        loss.block_until_ready()
    found = compiled.memory_analysis()
    return {"state": sum(leaf.nbytes for leaf in jax.tree.leaves((params, state))),
            "analysis": found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
            + found.temp_size_in_bytes}


def measure(contender: str, width: int, layers: int, rows: int) -> None:
    """Prints what one contender held, as JSON."""
    train = {"tpuspec": train_tpuspec, "jax": train_jax}[contender]
    samples = Samples()
    train(8, 2, rows, lambda number: None)
    before = samples.now()
    with samples.taken():
        told = train(width, layers, rows, samples.at_step)
    print(json.dumps({"held": min(samples.values) - before, "peak": max(samples.values) - before, **told}))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    sizes = arguments.width, arguments.layers, arguments.rows
    if arguments.contender:
        measure(arguments.contender, *sizes)
        return
    found: dict[str, list[dict[str, int]]] = {}
    for _ in range(arguments.repeats):
        for contender in CONTENDERS:
            command = [sys.executable, __file__, "--contender", contender, "--width", str(sizes[0]), "--layers",
                       str(sizes[1]), "--rows", str(sizes[2])]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                                    env={"PJRT_DEVICE": "CPU", "JAX_PLATFORMS": "cpu", **os.environ}).stdout
            found.setdefault(contender, []).append(json.loads(output.splitlines()[-1]))
    told = found["jax"][0]
    rows = [f"{'':<10}{'held MiB':>10}{'of state':>10}{'peak MiB':>10}{'of XLA count':>14}"]
    for contender, runs in found.items():
        held, peak = (statistics.median(run[name] for run in runs) for name in ("held", "peak"))
        print(json.dumps({
            "benchmark": "memory", "contender": contender, "metric": "memory of a step", "unit": "MiB",
            "held": round(held / MIB, 1), "peak": round(peak / MIB, 1), "state": round(told["state"] / MIB, 1),
            "analysis": round(told["analysis"] / MIB, 1), "peak_to_analysis": round(peak / told["analysis"], 3),
            "repeats": len(runs)}), flush=True)
        rows.append(f"{contender:<10}{held / MIB:>10.0f}{held / told['state']:>9.2f}x{peak / MIB:>10.0f}"
                    f"{peak / told['analysis']:>13.2f}x")
    print("\n".join(rows))
    print(f"the state is {told['state'] / MIB:.0f} MiB; XLA counts {told['analysis'] / MIB:.0f} MiB for the step")


if __name__ == "__main__":
    main()
