"""Batches on the device, as a replay takes them: their tensors flat, with a form to know them by."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from tpuspec.spec.results import Batch


def form_of(batch: Batch) -> Hashable:
    """Returns nesting, shapes and dtypes of a batch."""
    if (form := getattr(batch, "form", None)) is not None:
        return form
    features, labels = batch.features, batch.labels
    nesting: Hashable = None
    if not (isinstance(features, Tensor) and (labels is None or isinstance(labels, Tensor))):
        leaves, structure = pytree.tree_flatten((features, labels))
        nesting = (str(structure), *(leaf is None for leaf in leaves))
    return (nesting, *((tensor.shape, tensor.dtype) for tensor in batch.tensors()))


class SentBatch:
    """A batch on the device: its tensors flat, as a replay takes them, and nested, as model_fn does."""

    __slots__ = ("_nested", "_sent", "_source")

    def __init__(self, source: Batch, sent: list[Tensor]) -> None:
        self._source, self._sent = source, sent
        self._nested: Batch | None = None

    def tensors(self) -> list[Tensor]:
        return self._sent

    @property
    def form(self) -> Hashable:
        return form_of(self._source)

    @property
    def features(self) -> Any:
        return self._nest().features

    @property
    def labels(self) -> Any:
        return self._nest().labels

    def map(self, fn: Callable[[Tensor], Any]) -> Batch:
        return self._nest().map(fn)

    def _nest(self) -> Batch:
        if self._nested is None:
            sent = iter(self._sent)
            self._nested = self._source.map(lambda _: next(sent))
        return self._nested


class BatchesOfSteps:
    """The batches of several steps on the device, of one replica.

    Args:
      parts: the batches.
      form: nesting, shapes and dtypes of each.
    """

    __slots__ = ("form", "parts")

    def __init__(self, parts: Sequence[Batch], form: Hashable) -> None:
        self.parts = parts
        self.form = form

    def tensors(self) -> list[Tensor]:
        """Returns every tensor, step by step."""
        return [tensor for part in self.parts for tensor in part.tensors()]
