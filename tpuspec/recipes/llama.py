"""A Llama-style language model over bytes, from a size that a laptop trains to one for a pod of TPUs.

Trains: a causal transformer with RMSNorm, rotary positions, grouped-query attention and SwiGLU; AdamW under a cosine
  schedule with warm-up, gradients clipped to norm 1. Weights have the names of Hugging Face's Llama, and the same is
  computed with them.
Data: the source of Python's standard library, as in tpuspec/recipes/gpt_bytes.py: no download.
Expected score: 2.6 bits per byte on the kept files after the 300 steps of the config (8 is chance).
Time: under two minutes on two CPU cores.
Command: python -m tpuspec.train config=llama
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torchmetrics import MeanMetric, Metric

import tpuspec
from tpuspec import ModeKeys, TPUEstimatorSpec
from tpuspec.recipes import gpt_bytes

SHARDING: dict[str, list[str | None]] = {
    "*.[qkv]_proj.weight": ["model", None],
    "*.o_proj.weight": [None, "model"],
    "*.[gu]*_proj.weight": ["model", None],
    "*.down_proj.weight": [None, "model"],
    "*[sd].weight": ["model", None],  # embed_tokens, and lm_head where there is one
}
"""Rules of configs/config/llama_mesh.yaml: heads, hidden units of MLPs and the vocabulary are split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The shape of a model.

    Attributes:
      vocabulary: number of tokens.
      width: of the residual stream.
      num_layers: blocks.
      num_heads, num_kv_heads: heads of queries, and of keys and values; the first is a multiple of the second.
      head_width: of one head.
      mlp_width: hidden units of an MLP.
      rope_theta: base of the rotary wavelengths.
      rope_scaling: Llama 3.1's stretching of long wavelengths: factor, low_freq_factor, high_freq_factor and
        original_max_position_embeddings; None for none.
      norm_eps: added to mean squares.
      tied_head: whether the embedding is the head too.
      length: tokens of a window.
      remat: whether blocks are computed again in the backward pass, to save memory.
    """

    vocabulary: int = gpt_bytes.VOCABULARY
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_width: int
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, float] | None = None
    norm_eps: float = 1e-5
    tied_head: bool = False
    length: int
    remat: bool = True


SIZES = {
    "tiny": Shape(width=128, num_layers=4, num_heads=4, num_kv_heads=2, head_width=32, mlp_width=352, tied_head=True,
                  length=128, remat=False),
    "1b": Shape(width=2048, num_layers=16, num_heads=32, num_kv_heads=8, head_width=64, mlp_width=8192,
                rope_theta=500000.0, tied_head=True, length=2048),
    "7b": Shape(width=4096, num_layers=32, num_heads=32, num_kv_heads=32, head_width=128, mlp_width=11008, length=4096),
    "70b": Shape(width=8192, num_layers=80, num_heads=64, num_kv_heads=8, head_width=128, mlp_width=28672, length=4096),
}


def shape_of(params: Mapping[str, Any]) -> Shape:
    """Returns the shape that params ask for: of a size, or of Hugging Face's config.json, and what params change of it.

    Raises:
      ValueError: there is no such size, or its parts do not fit.
      FileNotFoundError: there is no such config.json.
    """
    size = params["size"]
    if size in SIZES:
        shape = SIZES[size]
    elif (config := Path(size) / "config.json").is_file():
        shape = _shape_of_config(json.loads(config.read_text()), str(config))
    else:
        raise ValueError(f"params.size must be {', '.join(SIZES)}, or a folder with Hugging Face's config.json; got "
                         f"{size!r}.")
    changes = {field.name: params[field.name] for field in dataclasses.fields(Shape)
               if params.get(field.name) is not None}
    shape = dataclasses.replace(shape, **changes)
    if shape.num_heads % shape.num_kv_heads or shape.head_width % 2:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads, and head_width even; got {shape.num_heads}, "
                         f"{shape.num_kv_heads} and {shape.head_width}.")
    return shape


def _shape_of_config(config: Mapping[str, Any], path: str) -> Shape:
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    theta = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
    wanted = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise ValueError(f"{path} has {key}={config[key]!r}; this recipe has {value!r} only.")
    if kind not in ("default", "llama3"):
        raise ValueError(f"{path} has rotary positions of type {kind!r}; this recipe has 'default' and 'llama3'.")
    heads = config["num_attention_heads"]
    return Shape(
        vocabulary=config["vocab_size"], width=config["hidden_size"], num_layers=config["num_hidden_layers"],
        num_heads=heads, num_kv_heads=config.get("num_key_value_heads") or heads,
        head_width=config.get("head_dim") or config["hidden_size"] // heads, mlp_width=config["intermediate_size"],
        rope_theta=theta, rope_scaling=rope if kind == "llama3" else None, norm_eps=config["rms_norm_eps"],
        tied_head=config.get("tie_word_embeddings", False), length=min(2048, config["max_position_embeddings"]))


class RMSNorm(nn.Module):
    """Divides by the root of the mean square, in float32: [..., width] -> the same."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """Returns the scaled tensor in the dtype of x."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotary_table(shape: Shape, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines of each position's angles, float32 [length, head_width]."""
    half = shape.head_width // 2
    frequencies = shape.rope_theta ** -(torch.arange(half, device=device, dtype=torch.float32) / half)
    if shape.rope_scaling is not None:
        frequencies = _stretch(frequencies, shape.rope_scaling)
    angles = torch.arange(length, device=device, dtype=torch.float32).unsqueeze(1) * torch.cat([frequencies] * 2)
    return angles.cos(), angles.sin()


def _stretch(frequencies: Tensor, scaling: Mapping[str, float]) -> Tensor:
    """Divides low frequencies by the factor, keeps high ones, and blends in between, as Llama 3.1 does."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"])


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turns pairs (i, i + head_width / 2) of each head by its position's angles: [batch, heads, length, head_width]."""
    first, second = x.chunk(2, dim=-1)
    turned = x * cosines + torch.cat([-second, first], dim=-1) * sines
    return turned.to(x.dtype)


class Attention(nn.Module):
    """Causal attention, in which several heads of queries share one of keys and values."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_width = shape.head_width
        of_queries, of_keys = shape.num_heads * shape.head_width, shape.num_kv_heads * shape.head_width
        self.q_proj = nn.Linear(shape.width, of_queries, bias=False)
        self.k_proj = nn.Linear(shape.width, of_keys, bias=False)
        self.v_proj = nn.Linear(shape.width, of_keys, bias=False)
        self.o_proj = nn.Linear(of_queries, shape.width, bias=False)

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Mixes positions with those before them: [batch, length, width] -> the same."""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        mixed = functional.scaled_dot_product_attention(
            rotate(q, cosines, sines), rotate(k, cosines, sines), v, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """SwiGLU: [..., width] -> the same."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.mlp_width, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.mlp_width, bias=False)
        self.down_proj = nn.Linear(shape.mlp_width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Computes each position alone."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """A transformer block: [batch, length, width] -> the same."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(shape), MLP(shape)
        self.input_layernorm = RMSNorm(shape.width, shape.norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.width, shape.norm_eps)

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Adds what the positions before, and then the position itself, say."""
        x = x + self.self_attn(self.input_layernorm(x), cosines, sines)
        return _by_rows(x + self.mlp(self.post_attention_layernorm(x)))


def _by_rows(x: Tensor) -> Tensor:
    # Else XLA may split activations as weights are, and gather them instead of the weights.
    return tpuspec.constrain(x, ["data", None, None])


class Backbone(nn.Module):
    """Tokens [batch, length] -> the last hidden states [batch, length, width]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.width, shape.norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the normalized hidden states."""
        x = _by_rows(self.embed_tokens(tokens))
        cosines, sines = rotary_table(self.shape, tokens.shape[1], tokens.device)
        for layer in self.layers:
            if self.shape.remat and torch.is_grad_enabled():
                x = checkpoint(layer, x, cosines, sines, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, cosines, sines)
        return self.norm(x)


class Llama(nn.Module):
    """Tokens [batch, length] -> logits of the next one [batch, length, vocabulary].

    Attributes:
      window: newest tokens of each sample [num_samples, length]; lives on the device between sampling steps.
    """

    window: Tensor

    def __init__(self, shape: Shape, num_samples: int) -> None:
        super().__init__()
        self.model = Backbone(shape)
        self.lm_head = None if shape.tied_head else nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.apply(_initialize)
        self.register_buffer("window", torch.zeros(num_samples, shape.length, dtype=torch.int64), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the logits."""
        hidden = self.model(tokens)
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return functional.linear(hidden, head.weight)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def model(params: Mapping[str, Any]) -> nn.Module:
    """Returns the network."""
    return Llama(shape_of(params), params["num_samples"])


def input_fn(params: Mapping[str, Any], mode: str) -> Any:
    """Returns windows of the text; in PREDICT a batch for each byte to sample."""
    return gpt_bytes.input_fn({**params, "length": shape_of(params).length}, mode)


def model_fn(features: Any, labels: Tensor | None, mode: str, params: Mapping[str, Any], model: Llama,
             optimizer: torch.optim.Optimizer | None, global_step: Tensor) -> TPUEstimatorSpec:
    """Builds one step.

    Args:
      features: tokens [batch, length]; in PREDICT prompts and starts, see `gpt_bytes.sample`.
      labels: the next tokens [batch, length]; None in PREDICT.
      mode: a ModeKeys value.
      params: those of the config.
      model: the network.
      optimizer: AdamW in TRAIN, else None.
      global_step: [1], the number of updates before this step.
    """
    if mode == ModeKeys.PREDICT:
        drawn = gpt_bytes.sample(model, features["prompt"], features["starts"], params["temperature"])
        return TPUEstimatorSpec(mode=mode, predictions={"byte": drawn})
    assert labels is not None
    return gpt_bytes.spec_of(mode, model(features).float(), labels, params, optimizer, global_step, metric_fn,
                             write_summaries)


class Perplexity(MeanMetric):
    """The exponential of the mean loss over all tokens; its updates take the mean loss of each window."""

    def __init__(self) -> None:
        super().__init__()
        self.set_dtype(torch.float64)

    def compute(self) -> Tensor:
        """Returns it."""
        return super().compute().exp()


def metric_fn(losses: Tensor, is_right: Tensor) -> dict[str, Tensor | tuple[Metric, tuple[Tensor]]]:
    """Returns perplexity, bits per byte and the share of bytes that were the likeliest; all windows are as long."""
    return {"perplexity": (Perplexity(), (losses,)), **gpt_bytes.metric_fn(losses, is_right)}


def write_summaries(global_step: Tensor, loss: Tensor, learning_rate: Tensor) -> None:
    """Writes bits per byte and learning rate to TensorBoard; runs on the host, on [num_replicas] tensors."""
    step = int(global_step[0]) + 1  # a step counts once its update is done
    tpuspec.summary.scalar("llama/bits_per_byte", loss.mean() / math.log(2), step=step)
    tpuspec.summary.scalar("llama/learning_rate", learning_rate[0], step=step)


def print_sample(trainer: tpuspec.Trainer) -> None:
    """Samples from the trained model, and prints the first sample after its prompt."""
    gpt_bytes.print_sample(trainer, input_fn)
