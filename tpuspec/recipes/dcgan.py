"""A conditional DCGAN that draws handwritten digits: two optimizers in one train_op, images by host_call.

Trains: a generator of transposed convolutions and a convolutional discriminator, both told the class; Adam for each.
Data: scikit-learn's digits, 1,797 real 8x8 grey images of ten classes, which come with scikit-learn: no download.
Expected score: the drawn digits look like digits (docs/dcgan.md shows a grid); a nearest-neighbour classifier of the
  real images reads the class that was asked for in about 93 % of the drawn ones.
Time: about a minute of CPU time for 1,500 steps, each step replayed.
Command: python -m tpuspec.train config=dcgan
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

import tpuspec
from tpuspec import ModeKeys, TPUEstimatorSpec

NUM_CLASSES = 10
ROWS_OF_GRID = 4
NUM_EVAL_IMAGES = 500
_LARGEST_PIXEL = 16.0


class Items(Dataset[Any]):
    """Features without labels: each item is a dict of one row."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: int) -> Any:
        return {name: tensor[index] for name, tensor in self.tensors.items()}


class Generator(nn.Module):
    """Noise [batch, noise] and classes [batch] -> images [batch, 1, 8, 8] in -1 .. 1."""

    def __init__(self, noise: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(noise + NUM_CLASSES, 2 * width * 4), nn.Unflatten(1, (2 * width, 2, 2)),
            nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, kernel_size=4, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.ConvTranspose2d(width, width, kernel_size=4, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 1, kernel_size=3, padding=1), nn.Tanh())

    def forward(self, noise: Tensor, classes: Tensor) -> Tensor:
        return self.layers(torch.cat([noise, functional.one_hot(classes, NUM_CLASSES).to(noise.dtype)], 1))


class Discriminator(nn.Module):
    """Images [batch, 1, 8, 8] and classes [batch] -> logits [batch], positive for real."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1 + NUM_CLASSES, width, kernel_size=3, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, kernel_size=4, stride=2, padding=1), nn.LeakyReLU(0.2), nn.Dropout(0.3),
            nn.Conv2d(2 * width, 2 * width, kernel_size=4, stride=2, padding=1), nn.LeakyReLU(0.2), nn.Dropout(0.3),
            nn.Flatten(), nn.Linear(2 * width * 4, 1))

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        planes = functional.one_hot(classes, NUM_CLASSES).to(images.dtype)[:, :, None, None].expand(-1, -1, 8, 8)
        return self.layers(torch.cat([images, planes], 1)).squeeze(1)


class Gan(nn.Module):
    """Generator and discriminator, and the noise of the grid that is drawn again and again."""

    grid_noise: Tensor
    grid_classes: Tensor

    def __init__(self, noise: int, width: int) -> None:
        super().__init__()
        self.num_noise = noise
        self.generator = Generator(noise, width)
        self.discriminator = Discriminator(width)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                nn.init.normal_(layer.weight, 0.0, 0.05)
        self.register_buffer("grid_noise", torch.randn(ROWS_OF_GRID * NUM_CLASSES, noise))
        self.register_buffer("grid_classes", torch.arange(NUM_CLASSES).repeat(ROWS_OF_GRID))


@functools.cache
def load_images() -> tuple[Tensor, Tensor]:
    """Returns the images [1797, 1, 8, 8] in -1 .. 1 and their classes [1797]."""
    digits: Any = load_digits()
    images = torch.tensor(digits.images / _LARGEST_PIXEL * 2 - 1, dtype=torch.float32).unsqueeze(1)
    return images, torch.tensor(digits.target, dtype=torch.int64)


def input_fn(params: Mapping[str, Any], mode: str) -> Dataset[Any]:
    """Returns real images with their classes in TRAIN; noise and the classes to draw in EVAL and PREDICT."""
    if mode == ModeKeys.TRAIN:
        return TensorDataset(*load_images())
    noise = torch.randn(NUM_EVAL_IMAGES, params["noise"], generator=torch.Generator().manual_seed(0))
    return Items({"noise": noise, "classes": torch.arange(NUM_EVAL_IMAGES) % NUM_CLASSES})


def serving_input_fn(params: Mapping[str, Any]) -> tpuspec.ServingInputReceiver:
    """Returns what a server receives, as the generator takes it: 'noise' [batch, noise] and 'classes' [batch]."""
    return tpuspec.ServingInputReceiver(
        {"noise": torch.zeros(1, params["noise"]), "classes": torch.zeros(1, dtype=torch.int64)})


def model(params: Mapping[str, Any]) -> nn.Module:
    """Returns both networks in one module."""
    return Gan(params["noise"], params["width"])


def optimizer(model: Gan, params: Mapping[str, Any]) -> dict[str, torch.optim.Optimizer]:
    """Returns an Adam for each network."""
    def adam(network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(network.parameters(), lr=params["learning_rate"], betas=(0.5, 0.999))

    return {"generator": adam(model.generator), "discriminator": adam(model.discriminator)}


def model_fn(features: Any, labels: Tensor | None, mode: str, params: Mapping[str, Any], model: Gan,
             optimizer: dict[str, torch.optim.Optimizer] | None, global_step: Tensor) -> TPUEstimatorSpec:
    """Builds one step.

    Args:
      features: real images [batch, 1, 8, 8] in TRAIN; else 'noise' [batch, noise] and 'classes' [batch].
      labels: classes of the real images [batch] in TRAIN.
      mode: a ModeKeys value.
      params: not needed here; every model_fn takes it.
      model: both networks.
      optimizer: one for each in TRAIN, else None.
      global_step: [1], the number of updates before this step.
    """
    if mode != ModeKeys.TRAIN:
        images = model.generator(features["noise"], features["classes"])
        if mode == ModeKeys.PREDICT:
            return TPUEstimatorSpec(mode=mode, predictions={"images": images, "classes": features["classes"]})
        losses = functional.softplus(-model.discriminator(images, features["classes"]))
        return TPUEstimatorSpec(mode=mode, loss=losses, eval_metrics=(metric_fn, [features["classes"], images]))
    assert optimizer is not None and labels is not None
    noise = torch.randn(features.shape[0], model.num_noise, device=features.device)
    fakes = model.generator(noise, labels)
    # One pass of the discriminator over real and drawn images; softplus(-x) is the cross entropy of "real".
    real, fake = model.discriminator(torch.cat([features, fakes.detach()]), labels.repeat(2)).chunk(2)
    discriminator_loss = functional.softplus(-real).mean() + functional.softplus(fake).mean()
    generator_loss = functional.softplus(-model.discriminator(fakes, labels)).mean()

    def train_op() -> None:
        losses = {"discriminator": discriminator_loss, "generator": generator_loss}
        for name, loss in losses.items():
            # Each network gets the gradients of its own loss only.
            loss.backward(inputs=list(getattr(model, name).parameters()))
        for name in losses:
            cross_shard = tpuspec.CrossShardOptimizer(optimizer[name])
            cross_shard.step()
            cross_shard.zero_grad()

    with torch.no_grad():
        model.generator.eval()
        grid = model.generator(model.grid_noise, model.grid_classes)
        model.generator.train()
    return TPUEstimatorSpec(mode=mode, loss=discriminator_loss, train_op=train_op, host_call=(write_summaries, {
        "global_step": global_step, "generator_loss": generator_loss.reshape(1),
        "discriminator_loss": discriminator_loss.reshape(1), "grid": grid.unsqueeze(0)}))


def to_grid(images: Tensor) -> Tensor:
    """Arranges images [4 * 10, 1, 8, 8] in -1 .. 1 as one [1, 40, 100] in 0 .. 1, a digit a column, with a border."""
    padded = functional.pad((images + 1) / 2, (1, 1, 1, 1), value=0.5)
    tiles = padded.reshape(ROWS_OF_GRID, NUM_CLASSES, *padded.shape[2:])
    return tiles.permute(0, 2, 1, 3).reshape(1, ROWS_OF_GRID * tiles.shape[2], NUM_CLASSES * tiles.shape[3])


def write_summaries(global_step: Tensor, generator_loss: Tensor, discriminator_loss: Tensor, grid: Tensor) -> None:
    """Writes both losses and the grid to TensorBoard; runs on the host, on the tensors of all replicas."""
    step = int(global_step[0]) + 1  # a step counts once its update is done
    tpuspec.summary.scalar("dcgan/generator_loss", generator_loss.mean(), step=step)
    tpuspec.summary.scalar("dcgan/discriminator_loss", discriminator_loss.mean(), step=step)
    tpuspec.summary.image("dcgan/digits", to_grid(grid[0]), step=step)


@functools.cache
def reader() -> KNeighborsClassifier:
    """Returns a classifier that knows the real images."""
    images, classes = load_images()
    return KNeighborsClassifier(n_neighbors=5).fit(images.flatten(1).numpy(), classes.numpy())


def metric_fn(classes: Tensor, images: Tensor) -> dict[str, Any]:
    """Returns how often a drawn digit is read as asked for, and the deviation between drawings; runs on the host."""
    read = torch.from_numpy(reader().predict(images.flatten(1).numpy()))
    return {"read_as_asked": tpuspec.metrics.accuracy(classes, read),
            "pixel_deviation": images.std(0).mean()}
