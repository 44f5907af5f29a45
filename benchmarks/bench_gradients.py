"""Does summing gradients by coalesced all-reduce cost more than DistributedDataParallel, on a GPT-like network?

Two processes on this machine, over gloo, with a batch each: forward, backward, reduction, SGD. Both ways in the same
run, in turns; the bare one is the same step without any reduction. Prints one line of JSON.

Command: python benchmarks/bench_gradients.py
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time

import torch
import torch.distributed as dist
from torch import nn

from tpuspec.native.gradients import sum_gradients

NUM_PROCESSES, WIDTH, NUM_LAYERS, BATCH, LENGTH = 2, 256, 4, 8, 32
WARM_UP, STEPS, ROUNDS = 3, 10, 8


def network() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, NUM_LAYERS, enable_nested_tensor=False)


class Way:
    """One way to do a step, with a network of its own."""

    def __init__(self, kind: str) -> None:
        self.kind, self.own = kind, network()
        self.model = nn.parallel.DistributedDataParallel(self.own) if kind == "ddp" else self.own
        self.parameters = list(self.own.parameters())
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.01)

    def step(self, x: torch.Tensor) -> None:
        self.model(x).square().mean().backward()
        if self.kind == "coalesced":
            sum_gradients(self.parameters, dist.all_reduce, scale=1 / NUM_PROCESSES)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def measure() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    x = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank()))
    ways = [Way(kind) for kind in ("bare", "coalesced", "ddp")]
    milliseconds: dict[str, list[float]] = {way.kind: [] for way in ways}
    for round_ in range(ROUNDS + 1):
        for way in ways:
            dist.barrier()
            begun = time.perf_counter()
            for _ in range(STEPS if round_ else WARM_UP):
                way.step(x)
            if round_:
                milliseconds[way.kind].append((time.perf_counter() - begun) / STEPS * 1000)
    if dist.get_rank() == 0:
        difference = max((a - b).abs().max().item() for a, b in zip(
            ways[1].parameters, ways[2].parameters, strict=True))
        print(json.dumps({
            "metric": "train step, 2 processes", "unit": "ms", "repeats": ROUNDS, "parameters": sum(
                p.numel() for p in ways[0].parameters), "largest_difference_of_weights": difference,
            **{kind: {"median": round(statistics.median(values), 2), "spread": round(max(values) - min(values), 2)}
               for kind, values in milliseconds.items()}, "torch": torch.__version__}))
    dist.destroy_process_group()


def main() -> None:
    if "RANK" in os.environ:
        measure()
        return
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    processes = [subprocess.Popen([sys.executable, __file__], env=os.environ | {
        "RANK": str(rank), "WORLD_SIZE": str(NUM_PROCESSES), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        for rank in range(NUM_PROCESSES)]
    sys.exit(max(process.wait() for process in processes))


if __name__ == "__main__":
    main()
