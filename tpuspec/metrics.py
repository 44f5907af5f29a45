"""The metrics of tf.metrics by their names, for metric_fn: each function returns (torchmetrics metric, its arguments).

    def metric_fn(labels, logits, weights):
        return {"accuracy": tpuspec.metrics.accuracy(labels, logits.argmax(1), weights),
                "auc": tpuspec.metrics.auc(labels, logits[:, 1], weights)}

Counts and sums are kept in float64, so that they are exact over any number of rows. `weights` is a number, or a tensor
that broadcasts against the values from the left: one a row, [batch], or one a value. Any metric of torchmetrics works
as well, as (metric, arguments of its update).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from tpuspec.errors import SpecError

__all__ = [
    "accuracy",
    "auc",
    "false_negatives",
    "false_positives",
    "mean",
    "mean_absolute_error",
    "mean_iou",
    "mean_per_class_accuracy",
    "mean_relative_error",
    "mean_squared_error",
    "precision",
    "recall",
    "root_mean_squared_error",
    "top_k_accuracy",
    "true_negatives",
    "true_positives",
]

Weights = Tensor | float | None
Pair = tuple[Metric, tuple[Any, ...]]


def mean(values: Tensor, weights: Weights = None) -> Pair:
    """Weighted mean of all values; nan without any weight."""
    return _Mean(), (values, _broadcast(weights, values))


def accuracy(labels: Tensor, predictions: Tensor, weights: Weights = None) -> Pair:
    """Share of predictions that equal their label; predictions are classes, not logits."""
    _check_same_shape("accuracy", labels, predictions)
    return mean(labels == predictions, weights)


def top_k_accuracy(labels: Tensor, logits: Tensor, k: int = 5, weights: Weights = None) -> Pair:
    """Share of rows whose label is among the k highest logits.

    Args:
      labels: classes [batch].
      logits: [batch, classes].
      k: how many.
      weights: as for all.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not 1 <= k <= logits.shape[1]:
        raise SpecError(f"top_k_accuracy needs labels [batch], logits [batch, classes] and k in 1 .. classes; got "
                        f"{list(labels.shape)}, {list(logits.shape)} and {k}.")
    return mean((logits.topk(k, dim=1).indices == labels.unsqueeze(1)).any(1), weights)


def mean_squared_error(labels: Tensor, predictions: Tensor, weights: Weights = None) -> Pair:
    """Mean of the squared differences."""
    return mean(_difference("mean_squared_error", labels, predictions).square(), weights)


def root_mean_squared_error(labels: Tensor, predictions: Tensor, weights: Weights = None) -> Pair:
    """Root of the mean of the squared differences, over all rows."""
    squares = _difference("root_mean_squared_error", labels, predictions).square()
    return _Mean(torch.sqrt), (squares, _broadcast(weights, squares))


def mean_absolute_error(labels: Tensor, predictions: Tensor, weights: Weights = None) -> Pair:
    """Mean of the absolute differences."""
    return mean(_difference("mean_absolute_error", labels, predictions).abs(), weights)


def mean_relative_error(labels: Tensor, predictions: Tensor, normalizer: Tensor, weights: Weights = None) -> Pair:
    """Mean of the absolute differences, each divided by the normalizer; 0 where that is 0."""
    errors = _difference("mean_relative_error", labels, predictions).abs()
    _check_same_shape("mean_relative_error", normalizer, predictions)
    return mean(torch.where(normalizer == 0, 0.0, errors / normalizer.double()), weights)


def true_positives(labels: Tensor, predictions: Tensor, weights: Weights = None) -> Pair:
    """Weight of the positive rows predicted positive; labels and predictions are booleans or numbers, 0 negative."""
    return _binary("true_positives", labels, predictions, weights, lambda counts: counts[1, 1])


def false_positives(labels: Tensor, predictions: Tensor, weights: Weights = None) -> Pair:
    """Weight of the negative rows predicted positive."""
    return _binary("false_positives", labels, predictions, weights, lambda counts: counts[0, 1])


def true_negatives(labels: Tensor, predictions: Tensor, weights: Weights = None) -> Pair:
    """Weight of the negative rows predicted negative."""
    return _binary("true_negatives", labels, predictions, weights, lambda counts: counts[0, 0])


def false_negatives(labels: Tensor, predictions: Tensor, weights: Weights = None) -> Pair:
    """Weight of the positive rows predicted negative."""
    return _binary("false_negatives", labels, predictions, weights, lambda counts: counts[1, 0])


def precision(labels: Tensor, predictions: Tensor, weights: Weights = None) -> Pair:
    """Share of true ones among the rows predicted positive; 0 where none is."""
    return _binary("precision", labels, predictions, weights, lambda counts: _ratio(counts[1, 1], counts[:, 1].sum()))


def recall(labels: Tensor, predictions: Tensor, weights: Weights = None) -> Pair:
    """Share of the positive rows that were predicted positive; 0 where none is."""
    return _binary("recall", labels, predictions, weights, lambda counts: _ratio(counts[1, 1], counts[1].sum()))


def mean_per_class_accuracy(labels: Tensor, predictions: Tensor, num_classes: int, weights: Weights = None) -> Pair:
    """Mean over classes of the share of a class's rows that were predicted so; a class without rows counts 0."""
    return _confusion("mean_per_class_accuracy", labels, predictions, weights, num_classes,
                      lambda counts: _ratio(counts.diagonal(), counts.sum(1)).mean())


def mean_iou(labels: Tensor, predictions: Tensor, num_classes: int, weights: Weights = None) -> Pair:
    """Mean intersection over union of the classes that occur."""
    def compute(counts: Tensor) -> Tensor:
        union = counts.sum(0) + counts.sum(1) - counts.diagonal()
        return _ratio(_ratio(counts.diagonal(), union).sum(), (union > 0).sum())

    return _confusion("mean_iou", labels, predictions, weights, num_classes, compute)


def auc(labels: Tensor, predictions: Tensor, weights: Weights = None) -> Pair:
    """Area under the ROC curve, exact where tf.metrics.auc approximates by 200 thresholds; nan with one class only.

    Args:
      labels: booleans, or numbers: 0 is negative.
      predictions: scores of any scale, the higher the more positive.
      weights: as for all.
    """
    _check_same_shape("auc", labels, predictions)
    return _Auc(), (labels != 0, predictions, _broadcast(weights, predictions))


class _Mean(Metric):
    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self, finish: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.finish = finish
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, weights: Tensor) -> None:
        self.total += (values.double() * weights).sum()
        self.weight += weights.sum()

    def compute(self) -> Tensor:
        value = self.total / self.weight
        return value if self.finish is None else self.finish(value)


class _Counts(Metric):
    """Weight of the rows by label and prediction, [label, prediction]."""

    full_state_update = False
    counts: Tensor

    def __init__(self, num_classes: int, finish: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.finish = finish
        self.add_state("counts", torch.zeros(num_classes, num_classes, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, labels: Tensor, predictions: Tensor, weights: Tensor) -> None:
        cells = labels.long().flatten() * self.num_classes + predictions.long().flatten()
        counts = torch.bincount(cells, weights.flatten(), minlength=self.num_classes ** 2)
        self.counts += counts.reshape(self.num_classes, self.num_classes)

    def compute(self) -> Tensor:
        return self.finish(self.counts)


class _Auc(Metric):
    full_state_update = False
    labels: list[Tensor]
    scores: list[Tensor]
    weights: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("labels", "scores", "weights"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, labels: Tensor, scores: Tensor, weights: Tensor) -> None:
        self.labels.append(labels.flatten())
        self.scores.append(scores.double().flatten())
        self.weights.append(weights.flatten())

    def compute(self) -> Tensor:
        from sklearn.metrics import roc_auc_score  # costs a second, which not every `import tpuspec` needs to pay

        labels, scores, weights = (torch.cat(list(part)) for part in (self.labels, self.scores, self.weights))
        counted = weights > 0
        if labels[counted].unique().numel() < 2:
            return torch.tensor(torch.nan, dtype=torch.float64)
        return torch.tensor(
            roc_auc_score(labels[counted].numpy(), scores[counted].numpy(), sample_weight=weights[counted].numpy()),
            dtype=torch.float64)


def _binary(name: str, labels: Tensor, predictions: Tensor, weights: Weights,
            finish: Callable[[Tensor], Tensor]) -> Pair:
    return _confusion(name, labels != 0, predictions != 0, weights, 2, finish)


def _confusion(name: str, labels: Tensor, predictions: Tensor, weights: Weights, num_classes: int,
               finish: Callable[[Tensor], Tensor]) -> Pair:
    _check_same_shape(name, labels, predictions)
    for what, classes in (("labels", labels), ("predictions", predictions)):
        if classes.numel() and not 0 <= classes.min().item() <= classes.max().item() < num_classes:
            raise SpecError(f"{name} needs {what} in 0 .. {num_classes - 1}; got {classes.min().item()} .. "
                            f"{classes.max().item()}.")
    return _Counts(num_classes, finish), (labels, predictions, _broadcast(weights, predictions))


def _difference(name: str, labels: Tensor, predictions: Tensor) -> Tensor:
    _check_same_shape(name, labels, predictions)
    return labels.double() - predictions.double()


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole == 0, 0.0, part / whole)


def _check_same_shape(name: str, labels: Tensor, predictions: Tensor) -> None:
    # Never broadcast: labels [batch, 1] against predictions [batch] would silently compare every pair.
    if labels.shape != predictions.shape:
        raise SpecError(f"{name} needs labels and predictions of one shape; got {list(labels.shape)} and "
                        f"{list(predictions.shape)}.")


def _broadcast(weights: Weights, values: Tensor) -> Tensor:
    """Returns float64 weights in the shape of the values."""
    given = torch.as_tensor(1.0 if weights is None else weights).double()
    aligned = given.reshape(*given.shape, *[1] * (values.ndim - given.ndim))
    if given.ndim > values.ndim or any(size not in (1, values.shape[i]) for i, size in enumerate(aligned.shape)):
        raise SpecError(f"weights must broadcast against values {list(values.shape)} from the left; got "
                        f"{list(given.shape)}.")
    return aligned.expand(values.shape)
