"""ResNets for images: ResNet-50 on a folder of files, ResNet-20 on CIFAR, a small one on digits that a laptop trains.

Trains: a residual network of basic or bottleneck blocks; SGD with momentum under a cosine schedule with warm-up, label
  smoothing. Weights have torchvision's names, so that its files of weights can be warm-started from.
Data: params.data is 'digits' (scikit-learn's 1,797 images, no download), a folder of CIFAR's binary files, or one with
  train/<class>/ and val/<class>/ of image files. Augmented on the host: random crops, and flips but for digits.
Expected score: accuracy of 0.98 to 0.99 on the 360 digits that are kept; 0.986 with the seed of the config.
Time: half a minute for 400 steps on two CPU cores.
Command: python -m tpuspec.train config=resnet
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric

import tpuspec
from tpuspec import ModeKeys, TPUEstimatorSpec
from tpuspec.recipes import digits
from tpuspec.recipes.image_data import (
    Images,
    decode,
    draw,
    find_files,
    load_cifar,
    pad_and_crop,
    random_resized_crop,
    resize_and_center_crop,
)

_PADDING = {8: 1, 32: 4}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The shape of a network.

    Attributes:
      depths: blocks of each stage.
      widths: channels of each stage's 3x3 convolutions.
      bottleneck: whether a block narrows its input to a quarter of its output.
      large: whether it begins with a 7x7 convolution and pooling that quarter the sides, for images of 224.
    """

    depths: Sequence[int]
    widths: Sequence[int]
    bottleneck: bool = False
    large: bool = True


SIZES = {
    "small": Shape(depths=(1, 1, 1), widths=(16, 32, 64), large=False),
    "resnet20": Shape(depths=(3, 3, 3), widths=(16, 32, 64), large=False),
    "resnet18": Shape(depths=(2, 2, 2, 2), widths=(64, 128, 256, 512)),
    "resnet50": Shape(depths=(3, 4, 6, 3), widths=(64, 128, 256, 512), bottleneck=True),
}


def load_digits(mode: str) -> tuple[Tensor, Tensor]:
    """Returns scikit-learn's digits as bytes [rows, 3, 8, 8], and their labels."""
    images, labels = digits.load_split(mode)
    return (images * 255).to(torch.uint8).expand(-1, 3, -1, -1), labels


def input_fn(params: Mapping[str, Any], mode: str) -> Images:
    """Returns the images; the Trainer shuffles, repeats and batches them."""
    is_training, with_labels = mode == ModeKeys.TRAIN, mode != ModeKeys.PREDICT
    data, side = str(params["data"]), params["side"]
    folder = Path(data)
    if data != "digits" and (folder / "train").is_dir():
        files, numbers, classes = find_files(folder, mode)
        _check_classes(len(classes), params)

        def cut(image: Tensor, drawn: Tensor | None) -> Tensor:
            return resize_and_center_crop(image, side) if drawn is None else random_resized_crop(
                image, drawn, side, params["least_area"])

        return Images(numbers, lambda row: decode(files[row].read_bytes(), str(files[row])),
                      draw if is_training else None, cut, with_labels=with_labels, on_threads=True)
    if data != "digits" and not folder.is_dir():
        raise FileNotFoundError(f"params.data must be 'digits', or a folder of images; there is no folder {data!r}.")
    images, labels = load_digits(mode) if data == "digits" else load_cifar(folder, mode)
    _check_classes(int(labels.max()) + 1, params)
    if images.shape[2] != side:
        raise ValueError(f"params.side={side}, and these images have {images.shape[2]}; set it to that.")

    def move(image: Tensor, drawn: Tensor | None) -> Tensor:
        # A mirrored digit is another one, or none.
        return image if drawn is None else pad_and_crop(image, drawn, _PADDING[side], flips=data != "digits")

    return Images(labels.tolist(), lambda row: images[row], draw if is_training else None, move,
                  with_labels=with_labels)


def _check_classes(found: int, params: Mapping[str, Any]) -> None:
    if found > params["num_classes"]:
        raise ValueError(f"{params['data']} has {found} classes, and params.num_classes is {params['num_classes']}.")


def serving_input_fn(params: Mapping[str, Any]) -> tpuspec.ServingInputReceiver:
    """Returns what a server receives: 'image', bytes [batch, 3, side, side]."""
    images = torch.zeros(1, 3, params["side"], params["side"], dtype=torch.uint8)
    return tpuspec.ServingInputReceiver(lambda received: received["image"], {"image": images})


# The network.

def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: [batch, inputs, h, w] -> [batch, width, h / stride, w / stride]."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _convolution(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _convolution(width, width, 3), nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride)
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Adds to the shortcut what the convolutions find."""
        found = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (found + (x if self.downsample is None else self.downsample(x))).relu()


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut: [batch, inputs, h, w] -> [batch, 4 * width, h / stride, ...]."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _convolution(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _convolution(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _convolution(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.downsample = _shortcut(inputs, 4 * width, stride)
        nn.init.zeros_(self.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Adds to the shortcut what the convolutions find."""
        found = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        found = self.bn3(self.conv3(found))
        return (found + (x if self.downsample is None else self.downsample(x))).relu()


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(_convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """Images as bytes [batch, 3, side, side] -> logits [batch, num_classes].

    Attributes:
      mean, std: of the colours, [3, 1, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, shape: Shape, num_classes: int) -> None:
        super().__init__()
        inputs = shape.widths[0]
        self.conv1 = _convolution(3, inputs, 7 if shape.large else 3, 2 if shape.large else 1)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if shape.large else None
        block, factor = (Bottleneck, 4) if shape.bottleneck else (BasicBlock, 1)
        self._stages = [f"layer{number}" for number in range(1, len(shape.depths) + 1)]
        for name, depth, width in zip(self._stages, shape.depths, shape.widths, strict=True):
            first = 1 if name == "layer1" else 2
            self.add_module(name, nn.Sequential(
                block(inputs, width, first), *(block(factor * width, width, 1) for _ in range(1, depth))))
            inputs = factor * width
        self.fc = nn.Linear(inputs, num_classes)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits."""
        x = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        x = self.bn1(self.conv1(x)).relu()
        x = x if self.maxpool is None else self.maxpool(x)
        for name in self._stages:
            x = getattr(self, name)(x)
        return self.fc(x.mean((2, 3)))


def model(params: Mapping[str, Any]) -> nn.Module:
    """Returns the network.

    Raises:
      ValueError: there is no such size.
    """
    size = params["size"]
    if size not in SIZES:
        raise ValueError(f"params.size must be {', '.join(SIZES)}; got {size!r}.")
    return ResNet(SIZES[size], params["num_classes"])


def optimizer(model: nn.Module, params: Mapping[str, Any]) -> torch.optim.Optimizer:
    """Returns SGD with Nesterov's momentum; only kernels decay."""
    kernels = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return torch.optim.SGD(
        [{"params": kernels, "weight_decay": params["weight_decay"]}, {"params": others, "weight_decay": 0.0}],
        lr=params["learning_rate"], momentum=params["momentum"], nesterov=True)


def scheduler(optimizer: torch.optim.Optimizer, params: Mapping[str, Any]) -> LambdaLR:
    """Returns a cosine from the full rate to 0 at the last step, after a linear warm-up."""
    warm_up, last = params["warm_up_steps"], params["schedule_steps"]

    def share_of_rate(step: int) -> float:
        if step < warm_up:
            return (step + 1) / (warm_up + 1)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm_up) / max(1, last - warm_up))))

    return LambdaLR(optimizer, share_of_rate)


def model_fn(features: Tensor, labels: Tensor | None, mode: str, params: Mapping[str, Any], model: nn.Module,
             optimizer: torch.optim.Optimizer | None, global_step: Tensor) -> TPUEstimatorSpec:
    """Builds one step.

    Args:
      features: images, bytes [batch, 3, side, side].
      labels: classes [batch]; None in PREDICT.
      mode: a ModeKeys value.
      params: those of the config.
      model: the network.
      optimizer: SGD in TRAIN, else None.
      global_step: [1], the number of updates before this step.
    """
    logits = model(features).float()
    if mode == ModeKeys.PREDICT:
        return TPUEstimatorSpec(mode=mode, predictions={
            "probabilities": functional.softmax(logits, dim=-1), "classes": logits.argmax(dim=-1)})
    assert labels is not None
    if mode == ModeKeys.EVAL:
        loss = functional.cross_entropy(logits, labels, reduction="none")
        return TPUEstimatorSpec(mode=mode, loss=loss, eval_metrics=(metric_fn, [labels, logits]))
    assert optimizer is not None
    loss = functional.cross_entropy(logits, labels, label_smoothing=params["label_smoothing"])
    learning_rate = torch.as_tensor(optimizer.param_groups[0]["lr"], dtype=torch.float32, device=loss.device)
    return TPUEstimatorSpec(
        mode=mode, loss=loss, train_op=tpuspec.CrossShardOptimizer(optimizer).minimize(loss),
        host_call=(write_summaries, [global_step, loss.detach().reshape(1), learning_rate.reshape(1)]))


def metric_fn(labels: Tensor, logits: Tensor) -> dict[str, tuple[Metric, tuple[Any, ...]]]:
    """Returns the share of images whose class was the likeliest, and among the five likeliest."""
    return {"accuracy": tpuspec.metrics.accuracy(labels, logits.argmax(dim=-1)),
            "top_5_accuracy": tpuspec.metrics.top_k_accuracy(labels, logits, min(5, logits.shape[1]))}


def write_summaries(global_step: Tensor, loss: Tensor, learning_rate: Tensor) -> None:
    """Writes loss and learning rate to TensorBoard; runs on the host, on [num_replicas] tensors."""
    step = int(global_step[0]) + 1  # a step counts once its update is done
    tpuspec.summary.scalar("resnet/loss", loss.mean(), step=step)
    tpuspec.summary.scalar("resnet/learning_rate", learning_rate[0], step=step)
