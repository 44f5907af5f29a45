"""The models in PyTorch, as their users write them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tpu_programs.cases import ResNet, Transformer


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int, *, bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, angles: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        split = (batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = self.qkv(x).view(split).permute(2, 0, 3, 1, 4)
        if angles is not None:
            q, k = _rotate(q, angles), _rotate(k, angles)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class _GPT2Block(nn.Module):
    def __init__(self, sizes: Transformer) -> None:
        super().__init__()
        width = sizes.width
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, sizes.num_heads, bias=True)
        self.up, self.down = nn.Linear(width, sizes.hidden), nn.Linear(sizes.hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class GPT2(nn.Module):
    """Tokens [batch, length] -> logits; the embedding is the last layer too."""

    def __init__(self, sizes: Transformer) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.position = nn.Parameter(torch.zeros(sizes.length, sizes.width))
        self.blocks = nn.Sequential(*[_GPT2Block(sizes) for _ in range(sizes.num_layers)])
        self.norm = nn.LayerNorm(sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.embedding(x) + self.position)
        return functional.linear(self.norm(x), self.embedding.weight)


def _angles(length: int, width: int, device: torch.device) -> Tensor:
    """Returns the angle of each position and pair, float32 [length, width / 2]."""
    rates = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
    return torch.outer(torch.arange(length, dtype=torch.float32, device=device), rates)


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class _RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class _LlamaBlock(nn.Module):
    def __init__(self, sizes: Transformer) -> None:
        super().__init__()
        width, hidden = sizes.width, sizes.hidden
        self.norm1, self.norm2 = _RMSNorm(width), _RMSNorm(width)
        self.attention = _Attention(width, sizes.num_heads, bias=False)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), angles)
        hidden = self.norm2(x)
        return x + self.down(functional.silu(self.gate(hidden)) * self.up(hidden))


class Llama(nn.Module):
    """Tokens [batch, length] -> logits; each block is computed again in the backward pass."""

    def __init__(self, sizes: Transformer) -> None:
        super().__init__()
        self.width = sizes.width // sizes.num_heads
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.blocks = nn.ModuleList(_LlamaBlock(sizes) for _ in range(sizes.num_layers))
        self.norm, self.head = _RMSNorm(sizes.width), nn.Linear(sizes.width, sizes.vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        angles = _angles(x.shape[1], self.width, x.device)
        x = self.embedding(x)
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, angles, use_reentrant=False)  # type: ignore[assignment]
        return self.head(self.norm(x))


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.norm1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if stride == 1 and inputs == outputs else nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.norm1(self.conv1(x)))
        out = functional.relu(self.norm2(self.conv2(out)))
        return functional.relu(self.norm3(self.conv3(out)) + self.shortcut(x))


class ResNetOfBottlenecks(nn.Module):
    """Images [batch, 3, size, size] -> logits."""

    def __init__(self, sizes: ResNet) -> None:
        super().__init__()
        width = sizes.width
        self.conv, self.norm = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        blocks, inputs = [], width
        for stage, num_blocks in enumerate(sizes.num_blocks):
            for i in range(num_blocks):
                blocks.append(_Bottleneck(inputs, width << stage, 2 if stage and not i else 1))
                inputs = 4 * (width << stage)
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(inputs, sizes.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.norm(self.conv(x))), 3, 2, 1)
        return self.head(self.blocks(x).mean((2, 3)))


MODELS = {"gpt2": GPT2, "llama": Llama, "resnet": ResNetOfBottlenecks}


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over all labels."""
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
