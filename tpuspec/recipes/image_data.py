"""Images for recipes: CIFAR's binary files, folders of image files, and augmentation on the host in plain torch."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from tpuspec import ModeKeys

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".webp"}
_CIFAR_SIDE = 32


class Images(Dataset[Any]):
    """Images as bytes [3, side, side] with their labels; features alone in PREDICT.

    Args:
      labels: of the images, int64.
      load: returns an image of a row, uint8 [3, height, width].
      draw: draws the random numbers of one augmentation; None for none.
      finish: makes an image [3, side, side] of one that was loaded, with what was drawn.
      with_labels: whether items are (image, label).
      on_threads: whether the images of a batch are loaded on several threads, as files are.
    """

    def __init__(self, labels: Sequence[int], load: Callable[[int], Tensor], draw: Callable[[], Tensor] | None,
                 finish: Callable[[Tensor, Tensor | None], Tensor], *, with_labels: bool,
                 on_threads: bool = False) -> None:
        self._labels, self._load, self._draw, self._finish = labels, load, draw, finish
        self._with_labels, self._on_threads = with_labels, on_threads

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Any:
        return self._item(index, self._load(index))

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Returns several at once."""
        if not self._on_threads:
            return [self[index] for index in indices]
        with ThreadPoolExecutor(thread_name_prefix="images") as threads:
            return [self._item(index, image) for index, image in zip(
                indices, threads.map(self._load, indices), strict=True)]

    def _item(self, index: int, loaded: Tensor) -> Any:
        image = self._finish(loaded, None if self._draw is None else self._draw())
        return (image, self._labels[index]) if self._with_labels else image


# Augmentation: uniform random numbers are drawn first, so that a run can be resumed exactly.

def draw() -> Tensor:
    """Draws what one image's augmentation needs: five numbers in 0 .. 1."""
    return torch.rand(5)


def pad_and_crop(image: Tensor, drawn: Tensor, padding: int, *, flips: bool) -> Tensor:
    """Moves an image by up to `padding` pixels on black ground, and mirrors half of them."""
    _, height, width = image.shape
    padded = functional.pad(image, [padding] * 4)
    top, left = (drawn[:2] * (2 * padding + 1)).long().tolist()
    cropped = padded[:, top:top + height, left:left + width]
    return cropped.flip(2) if flips and drawn[4] < 0.5 else cropped


def random_resized_crop(image: Tensor, drawn: Tensor, side: int, least_area: float) -> Tensor:
    """Scales a part of an image to [3, side, side], of `least_area` to all of its area and 3:4 to 4:3; mirrors half."""
    _, height, width = image.shape
    area = height * width * (least_area + (1 - least_area) * float(drawn[0]))
    ratio = math.exp((2 * float(drawn[1]) - 1) * math.log(4 / 3))
    rows, columns = min(height, round(math.sqrt(area / ratio))), min(width, round(math.sqrt(area * ratio)))
    rows, columns = max(1, rows), max(1, columns)
    top, left = int(float(drawn[2]) * (height - rows + 1)), int(float(drawn[3]) * (width - columns + 1))
    cropped = scale(image[:, top:top + rows, left:left + columns], (side, side))
    return cropped.flip(2) if drawn[4] < 0.5 else cropped


def resize_and_center_crop(image: Tensor, side: int) -> Tensor:
    """Scales the shorter side to 8/7 of `side`, and cuts [3, side, side] out of the middle."""
    _, height, width = image.shape
    factor = round(side * 8 / 7) / min(height, width)
    scaled = scale(image, (max(side, round(height * factor)), max(side, round(width * factor))))
    top, left = (scaled.shape[1] - side) // 2, (scaled.shape[2] - side) // 2
    return scaled[:, top:top + side, left:left + side]


def scale(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Scales bytes [3, height, width] to a size, smoothed where it gets smaller."""
    scaled = functional.interpolate(image.unsqueeze(0).float(), size, mode="bilinear", antialias=True)[0]
    return scaled.round().clamp(0, 255).to(torch.uint8)


# Where images come from.

def load_cifar(folder: Path, mode: str) -> tuple[Tensor, Tensor]:
    """Returns CIFAR-10 (data_batch_1.bin ..., test_batch.bin) or CIFAR-100 (train.bin, test.bin, the fine labels).

    Returns:
      Bytes [rows, 3, 32, 32], and labels [rows].

    Raises:
      FileNotFoundError: the files of the mode are missing.
      ValueError: one has another size than whole images have.
    """
    is_training = mode == ModeKeys.TRAIN
    ten, hundred = ("data_batch_*.bin", "train.bin") if is_training else ("test_batch.bin", "test.bin")
    found = [(path, 1) for path in sorted(folder.glob(ten))] or [(path, 2) for path in folder.glob(hundred)]
    if not found:
        raise FileNotFoundError(f"{folder} has no {ten} of CIFAR-10 and no {hundred} of CIFAR-100, binary version.")
    images, labels = [], []
    for path, num_labels in found:
        content, size = np.fromfile(path, dtype=np.uint8), num_labels + 3 * _CIFAR_SIDE ** 2
        if not len(content) or len(content) % size:
            raise ValueError(f"{path} has {len(content)} bytes, which is no multiple of {size}, an image and its "
                             f"label{'s' if num_labels > 1 else ''}.")
        rows = torch.from_numpy(content).view(-1, size)
        labels.append(rows[:, num_labels - 1].long())
        images.append(rows[:, num_labels:].reshape(-1, 3, _CIFAR_SIDE, _CIFAR_SIDE))
    return torch.cat(images), torch.cat(labels)


def find_files(folder: Path, mode: str) -> tuple[list[Path], list[int], list[str]]:
    """Returns the image files below train/<class>/, or val/<class>/ (or test/), their labels, and the classes.

    Raises:
      FileNotFoundError: there are none.
      ValueError: val has a class that train has not.
    """
    classes = sorted(path.name for path in (folder / "train").glob("*") if path.is_dir())
    part = "train" if mode == ModeKeys.TRAIN else next(
        (name for name in ("val", "test") if (folder / name).is_dir()), "val")
    files = sorted(path for path in (folder / part).glob("*/*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise FileNotFoundError(f"{folder / part} has no image files: they lie in a folder for each class, such as "
                                f"{folder / part / 'cat' / 'one.jpg'}.")
    if unknown := {path.parent.name for path in files} - set(classes):
        raise ValueError(f"{folder / part} has the class {min(unknown)!r}, which {folder / 'train'} has not.")
    return files, [classes.index(path.parent.name) for path in files], classes


def decode(content: bytes, name: str = "the image") -> Tensor:
    """Decodes an image file to bytes [3, height, width].

    Raises:
      ModuleNotFoundError: Pillow is not installed.
      ValueError: it is no image.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ModuleNotFoundError("image files are decoded by Pillow, which is not installed: pip install pillow. "
                                  "CIFAR's binary files need none.") from error
    try:
        with Image.open(io.BytesIO(content)) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{name} is no image that can be decoded: {error}") from error
