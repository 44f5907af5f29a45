"""tpuspec.metrics against numpy and scikit-learn, over steps of uneven size."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics
import torch

from tpuspec import metrics
from tpuspec.drain.metric_state import MetricState
from tpuspec.errors import SpecError

ROWS = 57
SIZES = (20, 20, 17)


def columns() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "label": torch.randint(0, 2, (ROWS,), generator=generator),
        "guess": torch.randint(0, 2, (ROWS,), generator=generator),
        "class": torch.randint(0, 4, (ROWS,), generator=generator),
        "class_guess": torch.randint(0, 4, (ROWS,), generator=generator),
        "logits": torch.randn(ROWS, 4, generator=generator),
        "x": torch.randn(ROWS, 3, generator=generator),
        "y": torch.randn(ROWS, 3, generator=generator),
        "score": torch.randn(ROWS, generator=generator).round(decimals=1),
        "weight": torch.randint(0, 4, (ROWS,), generator=generator).float(),
    }


def over_steps(make) -> float:
    """Evaluates one metric step by step, as evaluate() does."""
    state, start, table = MetricState(), 0, columns()
    for size in SIZES:
        state.update({"m": make(**{f"{k}_": v[start:start + size] for k, v in table.items()})}, size)
        start += size
    return state.compute()["m"]


def weights_of(weighted: bool) -> np.ndarray:
    return columns()["weight"].double().numpy() if weighted else np.ones(ROWS)


CASES = {
    "mean": (lambda w, x_, **_: metrics.mean(x_, w),
             lambda c, w: np.average(c["x"].mean(1), weights=w)),
    "accuracy": (lambda w, class_, class_guess_, **_: metrics.accuracy(class_, class_guess_, w),
                 lambda c, w: sklearn.metrics.accuracy_score(c["class"], c["class_guess"], sample_weight=w)),
    "precision": (lambda w, label_, guess_, **_: metrics.precision(label_, guess_, w),
                  lambda c, w: sklearn.metrics.precision_score(c["label"], c["guess"], sample_weight=w)),
    "recall": (lambda w, label_, guess_, **_: metrics.recall(label_, guess_, w),
               lambda c, w: sklearn.metrics.recall_score(c["label"], c["guess"], sample_weight=w)),
    "true_positives": (lambda w, label_, guess_, **_: metrics.true_positives(label_, guess_, w),
                       lambda c, w: w[(c["label"] == 1) & (c["guess"] == 1)].sum()),
    "false_positives": (lambda w, label_, guess_, **_: metrics.false_positives(label_, guess_, w),
                        lambda c, w: w[(c["label"] == 0) & (c["guess"] == 1)].sum()),
    "true_negatives": (lambda w, label_, guess_, **_: metrics.true_negatives(label_, guess_, w),
                       lambda c, w: w[(c["label"] == 0) & (c["guess"] == 0)].sum()),
    "false_negatives": (lambda w, label_, guess_, **_: metrics.false_negatives(label_, guess_, w),
                        lambda c, w: w[(c["label"] == 1) & (c["guess"] == 0)].sum()),
    "auc": (lambda w, label_, score_, **_: metrics.auc(label_, score_, w),
            lambda c, w: sklearn.metrics.roc_auc_score(c["label"], c["score"].astype(float), sample_weight=w)),
    "mean_squared_error": (lambda w, x_, y_, **_: metrics.mean_squared_error(x_, y_, w),
                           lambda c, w: sklearn.metrics.mean_squared_error(c["x"], c["y"], sample_weight=w)),
    "root_mean_squared_error": (
        lambda w, x_, y_, **_: metrics.root_mean_squared_error(x_, y_, w),
        lambda c, w: sklearn.metrics.mean_squared_error(c["x"], c["y"], sample_weight=w) ** 0.5),
    "mean_absolute_error": (lambda w, x_, y_, **_: metrics.mean_absolute_error(x_, y_, w),
                            lambda c, w: sklearn.metrics.mean_absolute_error(c["x"], c["y"], sample_weight=w)),
    "mean_relative_error": (lambda w, x_, y_, **_: metrics.mean_relative_error(x_, y_, x_.abs(), w),
                            lambda c, w: np.average((abs(c["x"] - c["y"]) / abs(c["x"])).mean(1), weights=w)),
    "top_k_accuracy": (
        lambda w, class_, logits_, **_: metrics.top_k_accuracy(class_, logits_, 2, w),
        lambda c, w: sklearn.metrics.top_k_accuracy_score(c["class"], c["logits"], k=2, sample_weight=w)),
    "mean_per_class_accuracy": (
        lambda w, class_, class_guess_, **_: metrics.mean_per_class_accuracy(class_, class_guess_, 4, w),
        lambda c, w: sklearn.metrics.balanced_accuracy_score(c["class"], c["class_guess"], sample_weight=w)),
    "mean_iou": (lambda w, class_, class_guess_, **_: metrics.mean_iou(class_, class_guess_, 4, w),
                 lambda c, w: sklearn.metrics.jaccard_score(
                     c["class"], c["class_guess"], average="macro", sample_weight=w)),
}


def test_every_metric_has_a_case():
    assert set(CASES) == set(metrics.__all__)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", CASES)
def test_metric_over_uneven_steps_is_that_of_the_whole_set(name, weighted):
    ours, reference = CASES[name]
    table = {key: value.double().numpy() if key in ("x", "y", "score", "logits") else value.numpy()
             for key, value in columns().items()}
    value = over_steps(lambda **c: ours(c["weight_"] if weighted else None, **c))
    assert isinstance(value, float)
    assert value == pytest.approx(reference(table, weights_of(weighted)), rel=1e-12, abs=0)


def test_counts_are_exact_beyond_float32():
    metric, arguments = metrics.true_positives(torch.ones(1), torch.ones(1), 2.0 ** 24)
    metric.update(*arguments)
    for _ in range(3):
        metric.update(torch.ones(1), torch.ones(1), torch.ones(1).double())
    assert metric.compute().item() == 2 ** 24 + 3


def test_undefined_values():
    zeros, ones = torch.zeros(3), torch.ones(3)
    for pair, expected in ((metrics.precision(ones, zeros), 0.0), (metrics.recall(zeros, ones), 0.0),
                           (metrics.auc(ones, ones), np.nan), (metrics.mean(ones, zeros), np.nan)):
        metric, arguments = pair
        metric.update(*arguments)
        assert metric.compute().item() == pytest.approx(expected, nan_ok=True)


def test_labels_and_predictions_are_never_broadcast():
    with pytest.raises(SpecError, match=r"accuracy needs labels and predictions of one shape; got \[3, 1\] and \[3\]"):
        metrics.accuracy(torch.zeros(3, 1), torch.zeros(3))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: metrics.mean(torch.zeros(3, 2), torch.zeros(2)), r"broadcast against values \[3, 2\] .*got \[2\]"),
    (lambda: metrics.mean(torch.zeros(3), torch.zeros(3, 1)), r"broadcast against values \[3\] .*got \[3, 1\]"),
    (lambda: metrics.mean_iou(torch.tensor([4]), torch.tensor([0]), 4), r"labels in 0 .. 3; got 4 .. 4"),
    (lambda: metrics.top_k_accuracy(torch.zeros(3), torch.zeros(3, 4), k=5), r"k in 1 .. classes; got .* and 5"),
])
def test_shapes_and_classes_that_do_not_fit_are_refused(call, message):
    with pytest.raises(SpecError, match=message):
        call()
