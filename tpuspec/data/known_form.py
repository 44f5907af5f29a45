"""Batches that need no second look: plain tensors of the form of a full batch that was checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpuspec.spec.results import Batch


class KnownForm:
    """The form of a full batch that was checked and taken as it is: a later one of that form passes the same checks.

    Only plain host tensors, a dict of them, and a pair (features, labels) of either have a form here; whatever else an
    input yields is checked each time.
    """

    def __init__(self) -> None:
        self._form: object = None

    def learn(self, element: Any, batch: Batch) -> None:
        """Learns the form of an element, if the batch that was made of it has the same tensors, labels aside."""
        form = _form_of(element)
        if form is None:
            return
        features, labels = element if type(element) is tuple else (element, None)
        given = (features, None if batch.labels is None else labels)
        if _memory_of(given) == _memory_of((batch.features, batch.labels)):
            self._form = form

    def forget(self) -> None:
        """Forgets the form: the next batch is checked."""
        self._form = None

    def batch(self, element: Any) -> Batch | None:
        """Returns the batch of an element of the known form, or None."""
        if self._form is None or _form_of(element) != self._form:
            return None
        features, labels = element if type(element) is tuple else (element, None)
        return Batch(features=_own(features), labels=_own(labels))


def _form_of(element: Any) -> object:
    if type(element) is not tuple:
        return _form_of_part(element)
    if len(element) != 2:
        return None
    features, labels = _form_of_part(element[0]), _form_of_part(element[1])
    return None if features is None or labels is None else (features, labels)


def _form_of_part(part: Any) -> object:
    if type(part) is Tensor:
        is_plain = part.is_cpu and part.layout is torch.strided and not part.requires_grad
        return (part.shape, part.dtype) if is_plain else None
    if type(part) is not dict:
        return None
    forms = [(key, _form_of_part(tensor)) for key, tensor in part.items() if type(tensor) is Tensor]
    return None if len(forms) < len(part) or any(form is None for _, form in forms) else forms


def _own(part: Any) -> Any:
    # A dict may be filled anew by the input for its next batch.
    return dict(part) if type(part) is dict else part


def _memory_of(pair: tuple[Any, Any]) -> list[object]:
    """Returns where each tensor of a pair lies, and as what."""
    return [(tensor.data_ptr(), tensor.stride(), tensor.dtype) for part in pair if part is not None
            for tensor in (part.values() if isinstance(part, dict) else [part])]
