"""A small GPT over bytes, trained on the source code of Python's own standard library.

Trains: a causal transformer (learned positions, tied embedding, dropout) to predict the next byte; AdamW under a cosine
  schedule with warm-up, gradients clipped to norm 1.
Data: the .py files of the standard library of the Python that runs it, without its tests and installed packages: about
  12 MB of real text that every machine has, no download. A tenth of the files, by a checksum of their names, is kept
  for evaluation.
Expected score: 3.3 bits per byte on the kept files after 300 steps (8 is chance), less after the 3,000 of the config.
Time: about a minute for 300 steps on two CPU cores.
Command: python -m tpuspec.train config=gpt_bytes run.max_steps=300
"""

from __future__ import annotations

import math
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset

import tpuspec
from tpuspec import ModeKeys, TPUEstimatorSpec

VOCABULARY = 256
END_OF_FILE = 0
PROMPT = b"def "
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
_TEST_SHARE = 10


def source_files(folder: Path) -> list[Path]:
    """Returns the .py files below a folder, in the order of their names.

    Raises:
      FileNotFoundError: there are none.
    """
    files = sorted(path for path in folder.rglob("*.py") if _LEFT_OUT.isdisjoint(path.relative_to(folder).parts))
    if not files:
        raise FileNotFoundError(f"there is no .py file below {folder}: this Python came without the source of its "
                                "library. Name a folder of text to train on, params.folder=DIR.")
    return files


def load_bytes(folder: str | None, mode: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Returns the text of the training files in TRAIN, else of the test files: uint8 [bytes], a zero behind each file.

    Args:
      folder: of .py files; None takes the standard library.
      mode: a ModeKeys value.
    """
    root = Path(folder or sysconfig.get_path("stdlib"))
    chosen = [path for path in source_files(root) if is_test_file(path.relative_to(root)) != (mode == ModeKeys.TRAIN)]
    text = b"".join(path.read_bytes() + bytes([END_OF_FILE]) for path in chosen)
    return np.frombuffer(text, dtype=np.uint8)


def is_test_file(path: Path) -> bool:
    """Tells whether a file, by its name below the folder, is kept for evaluation; the same on every machine."""
    return zlib.crc32(path.as_posix().encode()) % _TEST_SHARE == 0


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a text: bytes [length] as features, the bytes that follow each of them [length] as labels.

    Args:
      text: uint8 [bytes].
      length: of a window.
      num_windows: spread evenly over the text; None takes all that do not overlap.
    """

    def __init__(self, text: np.ndarray[Any, Any], length: int, num_windows: int | None = None) -> None:
        self._text, self._length = text, length
        all_windows = (len(text) - 1) // length
        if all_windows < 1:
            raise ValueError(f"the text has {len(text)} bytes, less than one window of {length} and the byte behind "
                             "it. Lower params.length, or name a folder with more text.")
        self._starts = np.linspace(
            0, all_windows - 1, min(num_windows or all_windows, all_windows)).astype(np.int64) * length

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = self._starts[index]
        window = torch.from_numpy(self._text[start:start + self._length + 1].astype(np.int64))
        return window[:-1], window[1:]


def input_fn(params: Mapping[str, Any], mode: str) -> Dataset[Any] | Iterable[dict[str, Tensor]]:
    """Returns windows of the text; in PREDICT a batch for each byte to sample."""
    if mode == ModeKeys.PREDICT:
        return _sampling_steps(params["batch_size"], params["length"], params["sample_bytes"])
    num_windows = None if mode == ModeKeys.TRAIN else params["eval_windows"]
    return Windows(load_bytes(params["folder"], mode), params["length"], num_windows)


def _sampling_steps(batch_size: int, length: int, num_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Yields a batch a byte: the prompt, and whether the window starts anew with it."""
    prompt = torch.full((batch_size, length), ord("\n"))
    prompt[:, -len(PROMPT):] = torch.tensor(list(PROMPT))
    for i in range(num_bytes):
        yield {"prompt": prompt, "starts": torch.full((batch_size,), i == 0)}


class Block(nn.Module):
    """A transformer block: [batch, length, width] -> the same."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2, self.dropout = nn.LayerNorm(width), nn.LayerNorm(width), nn.Dropout(dropout)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Adds what the other positions, and then the position itself, say."""
        batch, length, width = x.shape
        split = (batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = self.qkv(self.norm1(x)).view(split).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(batch, length, width)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """Bytes [batch, length] -> logits of the next byte [batch, length, 256].

    Attributes:
      window: newest bytes of each sample [num_samples, length]; lives on the device between sampling steps.
    """

    window: Tensor

    def __init__(self, params: Mapping[str, Any]) -> None:
        super().__init__()
        width, length = params["width"], params["length"]
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.Sequential(*[
            Block(width, params["num_heads"], params["dropout"]) for _ in range(params["num_layers"])])
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(params["dropout"])
        self.apply(_initialize)
        self.register_buffer("window", torch.zeros(params["num_samples"], length, dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits; the embedding is the last layer too."""
        x = self.dropout(self.embedding(x) + self.position)
        return self.norm(self.blocks(x)) @ self.embedding.weight.T


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


class Samples(Protocol):
    """What `sample` needs: a network, bytes [batch, length] -> logits [batch, length, 256], that keeps its samples.

    Attributes:
      window: newest bytes of each sample [num_samples, length].
    """

    window: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the logits."""
        ...


def sample(network: Samples, prompt: Tensor, starts: Tensor, temperature: float) -> Tensor:
    """Draws the next byte of each sample, [batch], and moves the windows on.

    Args:
      network: whose window is on the device.
      prompt: bytes [batch, length].
      starts: bool [batch], whether a sample begins with the prompt.
      temperature: below 1 prefers likely bytes.
    """
    window = network.window[:len(prompt)]
    current = torch.where(starts.unsqueeze(1), prompt, window)
    logits = network(current)[:, -1] / temperature
    # The largest of logits plus Gumbel noise is a draw from their softmax.
    noise = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-20, 1 - 1e-7)))
    drawn = (logits + noise).argmax(dim=-1)
    window.copy_(torch.cat([current[:, 1:], drawn.unsqueeze(1)], dim=1))
    return drawn


def model(params: Mapping[str, Any]) -> nn.Module:
    """Returns the network."""
    return GPT(params)


def optimizer(model: nn.Module, params: Mapping[str, Any]) -> torch.optim.Optimizer:
    """Returns AdamW; only matrices decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": params["weight_decay"]}, {"params": others, "weight_decay": 0.0}],
        lr=params["learning_rate"], betas=(0.9, 0.95))


def scheduler(optimizer: torch.optim.Optimizer, params: Mapping[str, Any]) -> LambdaLR:
    """Returns a cosine from the full rate to a tenth at the last step, behind a linear warm-up."""
    warm_up, last = params["warm_up_steps"], params["schedule_steps"]

    def share_of_rate(step: int) -> float:
        if step < warm_up:
            return (step + 1) / (warm_up + 1)
        progress = min(1.0, (step - warm_up) / max(1, last - warm_up))
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, share_of_rate)


def model_fn(features: Any, labels: Tensor | None, mode: str, params: Mapping[str, Any], model: GPT,
             optimizer: torch.optim.Optimizer | None, global_step: Tensor) -> TPUEstimatorSpec:
    """Builds one step.

    Args:
      features: bytes [batch, length]; in PREDICT prompts and starts, see `sample`.
      labels: the next bytes [batch, length]; None in PREDICT.
      mode: a ModeKeys value.
      params: those of the config.
      model: the network.
      optimizer: AdamW in TRAIN, else None.
      global_step: [1], the number of updates before this step.
    """
    if mode == ModeKeys.PREDICT:
        drawn = sample(model, features["prompt"], features["starts"], params["temperature"])
        return TPUEstimatorSpec(mode=mode, predictions={"byte": drawn})
    assert labels is not None
    return spec_of(mode, model(features), labels, params, optimizer, global_step, metric_fn, write_summaries)


def spec_of(mode: str, logits: Tensor, labels: Tensor, params: Mapping[str, Any],
            optimizer: torch.optim.Optimizer | None, global_step: Tensor, metric_fn: Callable[..., Any],
            write_summaries: Callable[..., Any]) -> TPUEstimatorSpec:
    """Returns the spec of a language model in TRAIN and EVAL, from its logits [batch, length, vocabulary]."""
    losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    if mode == ModeKeys.EVAL:
        is_right = (logits.argmax(dim=-1) == labels).float().mean(dim=1)
        return TPUEstimatorSpec(mode=mode, loss=losses.mean(dim=1), eval_metrics=(
            metric_fn, [losses.mean(dim=1), is_right]))
    assert optimizer is not None
    loss = losses.mean()
    learning_rate = torch.as_tensor(optimizer.param_groups[0]["lr"], dtype=torch.float32, device=loss.device)
    return TPUEstimatorSpec(
        mode=mode, loss=loss,
        train_op=tpuspec.CrossShardOptimizer(optimizer).minimize(loss, clip_grad_norm=params["clip_grad_norm"]),
        host_call=(write_summaries, [global_step, loss.detach().reshape(1), learning_rate.reshape(1)]))


def metric_fn(losses: Tensor, is_right: Tensor) -> dict[str, Tensor]:
    """Returns bits per byte and the share of bytes that were the likeliest, a value a window: both are averaged."""
    return {"bits_per_byte": losses / math.log(2), "byte_accuracy": is_right}


def write_summaries(global_step: Tensor, loss: Tensor, learning_rate: Tensor) -> None:
    """Writes bits per byte and learning rate to TensorBoard; runs on the host, on [num_replicas] tensors."""
    step = int(global_step[0]) + 1  # a step counts once its update is done
    tpuspec.summary.scalar("gpt_bytes/bits_per_byte", loss.mean() / math.log(2), step=step)
    tpuspec.summary.scalar("gpt_bytes/learning_rate", learning_rate[0], step=step)


def print_sample(trainer: tpuspec.Trainer, input_fn: Callable[..., Any] = input_fn) -> None:
    """Samples from the trained model, and prints the first sample after its prompt."""
    num_samples = trainer.params["num_samples"]
    drawn = [int(prediction["byte"]) for prediction in trainer.predict(input_fn)]
    text = PROMPT + bytes(drawn[::num_samples])
    print(f"a sample at step {trainer.global_step()}:\n{text.decode('utf-8', 'replace')}", flush=True)
