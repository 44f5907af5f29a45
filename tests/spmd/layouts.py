"""Searches for partitions of parameters under which a mesh does not train as one device does.

By hand, in a process of its own: SPMD_DEVICES=8 python -m tests.spmd.layouts '{"data": 2, "rows": 2, "columns": 2}'
--model conv --seconds 60. docs/spmd.md says what it has found.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from tpuspec import CrossShardOptimizer, RunConfig, TPUConfig, TPUEstimatorSpec, Trainer
from tpuspec.errors import ConfigError
from tpuspec.mesh import PartitionSpec, check_partitioner

Layout = tuple[PartitionSpec, PartitionSpec]
"""How the two weights of a network are split."""

TOLERANCE = 1e-5
BATCH, NUM_STEPS = 16, 2


class TwoLayers(nn.Module):
    """Two linear layers; its subclasses compute others. Batches are [batch, 8], or [batch, 8, 8] where `ndim` is 3."""

    ndim = 2
    shapes = ((16, 8), (8, 16))

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = (nn.Parameter(0.3 * torch.randn(shape, generator=generator)) for shape in self.shapes)

    def forward(self, x):
        return F.linear(torch.tanh(F.linear(x, self.first)), self.second)


class Convolutions(TwoLayers):
    """[batch, channel, place], with kernels of 8."""

    ndim = 3
    shapes = ((16, 8, 8), (8, 16, 8))

    def forward(self, x):
        hidden = torch.tanh(F.conv1d(x, self.first, padding=4)[..., :8])
        return F.conv1d(hidden, self.second, padding=4)[..., :8]


class Heads(TwoLayers):
    """[batch, time, width], by one matrix a head."""

    ndim = 3
    shapes = ((8, 16, 8), (8, 8, 16))

    def forward(self, x):
        hidden = torch.tanh(torch.einsum("btd,hkd->bthk", x, self.first))
        return torch.einsum("bthk,hdk->btd", hidden, self.second)


MODELS: dict[str, type[TwoLayers]] = {"linear": TwoLayers, "conv": Convolutions, "heads": Heads}


class Together(nn.Module):
    """Networks side by side: one program tries many layouts."""

    def __init__(self, kind: type[TwoLayers], num_nets: int) -> None:
        super().__init__()
        self.nets = nn.ModuleList([kind() for _ in range(num_nets)])


def model_fn(features, labels, mode, params, model, optimizer):
    loss = torch.stack([(net(features) - labels).square().mean() for net in model.nets]).sum()
    return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss))


def partitions(shape: Sequence[int], mesh: Mapping[str, int]) -> Iterator[PartitionSpec]:
    """Yields every partition of a tensor whose dims the axes divide, with the axes of a dim in each order."""
    for num_axes in range(len(mesh) + 1):
        for axes in itertools.permutations(mesh, num_axes):
            for cuts in itertools.combinations_with_replacement(range(num_axes + 1), len(shape) - 1):
                bounds = [0, *cuts, num_axes]
                spec = tuple(axes[start:stop] for start, stop in itertools.pairwise(bounds))
                if all(size % math.prod(mesh[axis] for axis in names) == 0
                       for size, names in zip(shape, spec, strict=True)):
                    yield spec


def layouts(kind: type[TwoLayers], mesh: Mapping[str, int]) -> list[Layout]:
    """Returns every way to split the two weights, in a random order that is always the same."""
    first, second = (sorted(set(partitions(shape, mesh))) for shape in kind.shapes)
    pairs = list(itertools.product(first, second))
    random.Random(0).shuffle(pairs)
    return pairs


def differences(kind: type[TwoLayers], mesh: Mapping[str, int], tried: Sequence[Layout], *,
                input_partition_dims: Sequence[int] | None = None) -> list[float]:
    """Trains each layout for some steps; returns how far its weights are from those of plain torch, the largest."""
    shape = (BATCH, *[8] * (kind.ndim - 1))
    generator = torch.Generator().manual_seed(1)
    features, labels = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)

    def input_fn(params):
        size = params["batch_size"]
        return [(features[i:i + size], labels[i:i + size]) for _ in range(NUM_STEPS) for i in range(0, BATCH, size)]

    sharding = {f"nets.{i}.{name}": [list(names) for names in spec] for i, layout in enumerate(tried)
                for name, spec in zip(("first", "second"), layout, strict=True) if any(spec)}
    split = {} if input_partition_dims is None else {
        "input_partition_dims": [list(input_partition_dims)], "per_host_input_for_training": "PER_HOST_V2"}
    trainer = Trainer(
        model_fn, model=lambda params: Together(kind, len(tried)), params={}, train_batch_size=BATCH,
        optimizer=lambda model, params: torch.optim.SGD(model.parameters(), lr=0.5),
        config=RunConfig(seed=0, show_progress=False, capture="off", tpu_config=TPUConfig(
            iterations_per_loop=NUM_STEPS, mesh=dict(mesh), sharding=sharding or None, **split)))
    trainer.train(input_fn, steps=NUM_STEPS)
    found = trainer._sessions[True].model_state()
    plain = kind()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        (plain(features) - labels).square().mean().backward()
        optimizer.step()
    return [max((found[f"nets.{i}.{name}"] - parameter).abs().max().item()
                for name, parameter in plain.named_parameters()) for i in range(len(tried))]


@contextlib.contextmanager
def nothing_refused():
    """Lets the settings through that XLA's partitioner gets wrong."""
    with (mock.patch("tpuspec.mesh.check_partitioner", lambda *arguments: None),
          mock.patch("tpuspec.tracer.layouts.check_batch_partitioner", lambda *arguments: None)):
        yield


def is_allowed(spec: PartitionSpec, mesh: Mapping[str, int]) -> bool:
    """Whether the settings let a parameter be split so."""
    try:
        check_partitioner("", spec, mesh)
    except ConfigError:
        return False
    return True


def _told(layout: Layout) -> str:
    return " and ".join(f"[{', '.join('+'.join(names) or '-' for names in spec)}]" for spec in layout)


def _in_parts(items: Sequence[Layout], size: int) -> Iterable[Sequence[Layout]]:
    return (items[i:i + size] for i in range(0, len(items), size))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mesh", type=json.loads)
    parser.add_argument("--model", choices=MODELS, default="linear")
    parser.add_argument("--input-partition-dims", type=json.loads)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--allowed", action="store_true", help="only what the settings allow")
    options = parser.parse_args()
    end, num_tried, num_wrong = time.monotonic() + options.seconds, 0, 0
    candidates = [layout for layout in layouts(MODELS[options.model], options.mesh)
                  if not options.allowed or all(is_allowed(spec, options.mesh) for spec in layout)]
    with nothing_refused():
        for part in _in_parts(candidates, 12):
            found = differences(MODELS[options.model], options.mesh, part,
                                input_partition_dims=options.input_partition_dims)
            num_tried += len(part)
            for layout, difference in zip(part, found, strict=True):
                if not difference < TOLERANCE:
                    num_wrong += 1
                    print(f"{_told(layout)}: off by {difference:.2g}", flush=True)
            if time.monotonic() > end:
                break
    print(f"{num_tried} layouts tried, {num_wrong} wrong")
