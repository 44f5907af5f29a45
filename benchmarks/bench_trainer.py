"""What does the Trainer cost over a hand-written torch_xla loop? ms per training step, interleaved in one process.

    python benchmarks/bench_trainer.py [--repeats 5] [--steps 100]

Prints one JSON line per model: median ms per step of each, and their ratio (below 1: the Trainer is faster). The loop
by hand reads no loss, so that its steps run ahead; the Trainer drains it every step and runs a host_call. On the traced
path the Trainer is slower by what it waits for the step before, and by its checks of each new spec.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time

os.environ.setdefault("PJRT_DEVICE", "CPU")

import torch
import torch_xla
import torch_xla.core.xla_model as xm
from torch import nn
from torch.nn import functional

import tpuspec


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1),
                         nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))


MODELS = {"mlp": (mlp, (64,)), "cnn": (cnn, (1, 8, 8))}


def adamw(module: nn.Module, params: object = None) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-3)


class ByHand:
    """A plain loop: send, forward, backward, xm.optimizer_step, sync."""

    def __init__(self, module: nn.Module, batches: list) -> None:
        self.device = torch_xla.device()
        self.module, self.batches = module.to(self.device), batches
        self.optimizer = adamw(self.module)

    def run(self, steps: int) -> float:
        begun = time.perf_counter()
        for k in range(steps):
            x, y = (t.to(self.device) for t in self.batches[k % len(self.batches)])
            loss = functional.cross_entropy(self.module(x), y)
            with torch.autograd.set_multithreading_enabled(False):
                loss.backward()
            xm.optimizer_step(self.optimizer)
            self.optimizer.zero_grad()
            torch_xla.sync()
        xm.wait_device_ops()
        return (time.perf_counter() - begun) / steps * 1e3


class ByTrainer:
    """The whole Trainer: input pipeline, loss drained every step, a host_call."""

    def __init__(self, module: nn.Module, batches: list) -> None:
        self.batches = batches
        self.trainer = tpuspec.Trainer(
            self.model_fn, model=module, optimizer=adamw, model_dir=tempfile.mkdtemp(), train_batch_size=64,
            config=tpuspec.RunConfig(seed=0, show_progress=False, save_checkpoints_secs=None,
                                     tpu_config=tpuspec.TPUConfig(iterations_per_loop=100)))

    @staticmethod
    def model_fn(features, labels, mode, params, model, optimizer, global_step):
        loss = functional.cross_entropy(model(features), labels)
        return tpuspec.TPUEstimatorSpec(
            mode, loss=loss, train_op=tpuspec.CrossShardOptimizer(optimizer).minimize(loss),
            host_call=(lambda step, loss: None, [global_step, loss.reshape(1)]))

    def run(self, steps: int) -> float:
        times = []

        class Clock(tpuspec.SessionRunHook):
            def before_run(self, context):
                times.append(time.perf_counter())

        def input_fn(params):
            return (self.batches[k % len(self.batches)] for k in range(100 + steps))

        # The first loop of each call is left out: it holds the start of the input.
        self.trainer.train(input_fn, hooks=[Clock()], steps=100 + steps)
        return (time.perf_counter() - times[1]) / steps * 1e3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    logging.getLogger("tpuspec").setLevel(logging.ERROR)
    for name, (build, shape) in MODELS.items():
        torch.manual_seed(0)
        batches = [(torch.randn(64, *shape), torch.randint(0, 10, (64,))) for _ in range(8)]
        runners = {"by_hand": ByHand(build(), batches), "trainer": ByTrainer(build(), batches)}
        for runner in runners.values():
            runner.run(arguments.steps)
        times = {key: [] for key in runners}
        for _ in range(arguments.repeats):
            for key, runner in runners.items():
                times[key].append(runner.run(arguments.steps))
        medians = {key: statistics.median(values) for key, values in times.items()}
        print(json.dumps({
            "benchmark": "trainer", "model": name, "unit": "ms/step", "repeats": arguments.repeats,
            **{key: round(value, 3) for key, value in medians.items()},
            "spread": {key: [round(min(values), 3), round(max(values), 3)] for key, values in times.items()},
            "ratio": round(medians["trainer"] / medians["by_hand"], 3),
            "torch": torch.__version__, "torch_xla": torch_xla.__version__}))


if __name__ == "__main__":
    main()
