"""Four training workloads: three whose time is the host's, one whose time is XLA's arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

NUM_BATCHES = 8
SEED = 0
VOCABULARY, CONTEXT = 256, 32


class Block(nn.Module):
    """A transformer block with explicit attention, so that every framework runs the same operations."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = (batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = self.qkv(self.norm1(x)).view(split).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)) * (width // self.num_heads) ** -0.5
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(future, -1e9).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Bytes [batch, length] -> logits [batch, length, 256]; four layers of width 64."""

    def __init__(self, width: int = 64, num_layers: int = 4, num_heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(torch.zeros(CONTEXT, width))
        self.blocks = nn.Sequential(*[Block(width, num_heads) for _ in range(num_layers)])
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(x) + self.position))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1),
                         nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))


CONVNET_CHANNELS = (3, 32, 64, 128, 128)


def convnet() -> nn.Module:
    """Four convolutions over 32x32 images, halved twice: hundreds of milliseconds a step on two CPU cores."""
    c = CONVNET_CHANNELS
    return nn.Sequential(
        nn.Conv2d(c[0], c[1], 3, padding=1), nn.ReLU(), nn.Conv2d(c[1], c[2], 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(c[2], c[3], 3, padding=1), nn.ReLU(), nn.Conv2d(c[3], c[4], 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(c[4] * 8 * 8, 10))


def sgd(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)  # type: ignore[arg-type]


def adamw(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is trained.

    Attributes:
      build: makes the network.
      make_optimizer: of the parameters.
      features: shape of one row; () where a row is CONTEXT bytes.
      batch_size: rows of a batch.
      num_steps: steps of one measurement, unless the command line says otherwise.
      steps_per_execution: as the Trainer is set for it.
    """

    build: Callable[[], nn.Module]
    make_optimizer: Callable[[object], torch.optim.Optimizer]
    features: tuple[int, ...]
    batch_size: int
    num_steps: int
    steps_per_execution: int = 1

    def build_seeded(self) -> nn.Module:
        torch.manual_seed(SEED)
        return self.build()

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Returns NUM_BATCHES batches on the host, which every contender goes round."""
        generator = torch.Generator().manual_seed(SEED)
        if not self.features:
            shape = (self.batch_size, CONTEXT)
            return [(torch.randint(0, VOCABULARY, shape, generator=generator),
                     torch.randint(0, VOCABULARY, shape, generator=generator)) for _ in range(NUM_BATCHES)]
        return [(torch.randn(self.batch_size, *self.features, generator=generator),
                 torch.randint(0, 10, (self.batch_size,), generator=generator)) for _ in range(NUM_BATCHES)]


WORKLOADS = {
    "mlp": Workload(build=mlp, make_optimizer=sgd, features=(64,), batch_size=64, num_steps=1000,
                    steps_per_execution=8),
    "cnn": Workload(build=cnn, make_optimizer=adamw, features=(1, 8, 8), batch_size=64, num_steps=300,
                    steps_per_execution=4),
    "gpt": Workload(build=GPT, make_optimizer=adamw, features=(), batch_size=8, num_steps=300),
    "convnet": Workload(build=convnet, make_optimizer=adamw, features=(3, 32, 32), batch_size=64, num_steps=20),
}


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy; of every position where logits are [batch, length, classes]."""
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
