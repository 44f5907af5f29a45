"""Batches on the device, as a replay takes them: their tensors flat, with a form to know them by."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from tpuspec.spec.engine import Layout
from tpuspec.spec.results import Batch


def _form_of(batch: Batch) -> Hashable:
    features, labels = batch.features, batch.labels
    nesting: Hashable = None
    if not (isinstance(features, Tensor) and (labels is None or isinstance(labels, Tensor))):
        leaves, structure = pytree.tree_flatten((features, labels))
        nesting = (str(structure), *(leaf is None for leaf in leaves))
    return (nesting, *((tensor.shape, tensor.dtype) for tensor in batch.tensors()))


def told_tensors(batch: Batch) -> list[str]:
    """Names each tensor of a batch by its place, such as "features['image']"; in the order of `Batch.tensors`."""
    return [kind + pytree.keystr(path) for kind, tree in (("features", batch.features), ("labels", batch.labels))
            for path, leaf in pytree.tree_flatten_with_path(tree)[0] if isinstance(leaf, Tensor)]


class SentBatch:
    """A batch for the device: its tensors flat, as a replay takes them, and nested, as model_fn does.

    Args:
      source: on the host.
      send: copies its tensors to the device that steps are traced on.
      arrays: they as inputs of an engine's programs.
      layouts: of each.

    Attributes:
      form: nesting, shapes and dtypes.
      of_steps: inputs that have the batches of several steps, [number of steps, ...]; None where it came alone.
    """

    __slots__ = ("_nested", "_send", "_sent", "_source", "arrays", "form", "layouts", "of_steps")

    def __init__(self, source: Batch, send: Callable[[list[Tensor]], list[Tensor]], arrays: list[Any],
                 layouts: Sequence[Layout], of_steps: Sequence[Any] | None = None) -> None:
        self.arrays, self.layouts, self.of_steps = arrays, layouts, of_steps
        self._source, self._send = source, send
        self.form = _form_of(source)
        self._sent: list[Tensor] | None = None
        self._nested: Batch | None = None

    def tensors(self) -> list[Tensor]:
        if self._sent is None:
            self._sent = self._send(self._source.tensors())
        return self._sent

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
            sent = iter(self.tensors())
            self._nested = self._source.map(lambda _: next(sent))
        return self._nested
