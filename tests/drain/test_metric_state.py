from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import (
    CatMetric,
    MeanAbsoluteError,
    MeanMetric,
    MeanSquaredError,
    Metric,
    MetricCollection,
    SumMetric,
)
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy

from tpuspec.drain.metric_state import MetricState, check_metric_names, to_plain
from tpuspec.errors import SpecError, SpecTypeError, TpuspecError

GENERATOR = torch.Generator().manual_seed(0)
SCORES = torch.rand(50, generator=GENERATOR)
TARGETS = (torch.rand(50, generator=GENERATOR) > 0.5).int()
STEPS = [slice(0, 16), slice(16, 32), slice(32, 48), slice(48, 50)]

METRICS = pytest.mark.parametrize("make", [
    MeanSquaredError, BinaryAUROC, lambda: MulticlassAccuracy(num_classes=2, average="micro")],
    ids=["sums", "lists", "counts"])


def arguments(make: Any, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    if make is MeanSquaredError:
        return SCORES[rows], TARGETS[rows].float()
    return (SCORES[rows] if make is BinaryAUROC else SCORES[rows].round().int()), TARGETS[rows]


def on_all_rows(make: Any) -> float:
    metric = make()
    metric.update(*arguments(make, slice(0, 50)))
    return metric.compute().item()


def size(rows: slice) -> int:
    return rows.stop - rows.start


@METRICS
def test_a_new_metric_each_step_with_its_arguments_equals_one_over_all_rows(make):
    state = MetricState()
    for rows in STEPS:
        state.update({"m": (make(), arguments(make, rows))}, size(rows))
    assert state.compute()["m"] == pytest.approx(on_all_rows(make), rel=1e-6)


@METRICS
@pytest.mark.parametrize("bare", [True, False])
def test_a_new_updated_metric_each_step_equals_one_over_all_rows(make, bare):
    state = MetricState()
    for rows in STEPS:
        metric = make()
        metric.update(*arguments(make, rows))
        state.update({"m": metric if bare else (metric, None)}, size(rows))
    assert state.compute()["m"] == pytest.approx(on_all_rows(make), rel=1e-6)


@METRICS
@pytest.mark.parametrize("bare", [True, False])
def test_a_metric_of_the_users_that_is_updated_each_step_is_counted_once(make, bare):
    state, metric = MetricState(), make()
    for rows in STEPS:
        metric.update(*arguments(make, rows))
        state.update({"m": metric if bare else (metric, None)}, size(rows))
    assert state.compute()["m"] == pytest.approx(on_all_rows(make), rel=1e-6)


def test_a_new_metric_of_rows_each_step_keeps_them_in_the_order_of_the_steps():
    state = MetricState()
    for value in (1.0, 2.0, 3.0):
        metric = CatMetric()
        metric.update(value)
        state.update({"m": metric}, 1)
    assert state.compute()["m"].tolist() == [1.0, 2.0, 3.0]


def test_a_metric_computed_in_metric_fn_does_not_freeze_its_value():
    state = MetricState()
    for value in (1.0, 2.0, 3.0):
        metric = SumMetric()
        metric.update(value)
        metric.compute()
        state.update({"m": metric}, 1)
    assert state.compute() == {"m": 6.0}


def test_a_users_metric_starts_each_evaluation_afresh():
    metric, values = SumMetric(), []
    for _ in range(2):
        state = MetricState()
        for value in (1.0, 2.0):
            metric.update(value)
            state.update({"m": metric}, 1)
        values.append(state.compute()["m"])
        state.reset_owned()
    assert values == [3.0, 3.0]


def test_a_users_metric_in_a_pair_starts_each_evaluation_afresh():
    metric, values = SumMetric(), []
    for _ in range(2):
        state = MetricState()
        for value in (1.0, 2.0):
            state.update({"m": (metric, (value,))}, 1)
        values.append(state.compute()["m"])
    assert values == [3.0, 3.0]


class MeanReduced(Metric):
    """Its state is averaged over replicas, which knows no weights: two cannot be merged."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("value", torch.tensor(0.0), dist_reduce_fx="mean")

    def update(self, value):
        self.value += value

    def compute(self):
        return self.value


def test_metrics_that_cannot_be_merged_are_refused_and_never_give_a_wrong_value():
    state = MetricState()
    with pytest.raises(TpuspecError, match="'m'"):
        for value in (1.0, 3.0):
            metric = MeanReduced()
            metric.update(value)
            state.update({"m": metric}, 1)


def test_numbers_are_averaged_by_rows():
    state = MetricState()
    for value, num_rows in ((1.0, 4), (2, 4), (torch.tensor(7.0), 2)):
        state.update({"m": value}, num_rows)
    assert state.compute() == {"m": (4 + 8 + 14) / 10}


@settings(deadline=None)
@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=5), min_size=1, max_size=6))
def test_one_value_a_row_is_averaged_exactly(batches):
    state = MetricState()
    for batch in batches:
        state.update({"m": torch.tensor(batch)}, len(batch))
    rows = [row for batch in batches for row in batch]
    assert state.compute()["m"] == pytest.approx(math.fsum(rows) / len(rows), abs=1e-9)


def test_a_sum_that_float32_would_lose_is_kept():
    state = MetricState()
    state.update({"m": torch.tensor([2.0**24, 1.0])}, 2)
    state.update({"m": torch.tensor([1.0, 1.0])}, 2)
    assert state.compute()["m"] == (2**24 + 3) / 4


def test_rows_of_vectors_are_averaged_to_a_vector():
    state = MetricState()
    state.update({"m": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, 2)
    state.update({"m": torch.tensor([[5.0, 9.0]])}, 1)
    assert isinstance(value := state.compute()["m"], np.ndarray)
    assert value.tolist() == [3.0, 5.0]


@pytest.mark.parametrize("value", [torch.tensor([True, False]), torch.tensor([1, 0])])
def test_counts_and_claims_are_averaged_as_numbers(value):
    state = MetricState()
    state.update({"m": value}, 2)
    assert state.compute() == {"m": 0.5}


def test_a_tensor_of_other_rows_is_refused_by_name():
    with pytest.raises(SpecTypeError, match=r"metric 'm' must be a number, or a tensor with one value per row, "
                                            r"\[4, ...\].*got shape \[3\]"):
        MetricState().update({"m": torch.ones(3)}, 4)


@pytest.mark.parametrize("name", ["loss", "global_step"])
def test_eval_07_reserved_names_are_refused(name):
    with pytest.raises(SpecError, match=f"Metric with name `{name}` is not allowed, because Estimator already defines"):
        MetricState().update({name: 1.0}, 1)


@pytest.mark.parametrize("value", ["1.0", None, [1.0], {"a": 1.0}, np.ones(2)])
def test_spec_11_a_value_of_another_kind_is_a_type_error(value):
    with pytest.raises(SpecTypeError, match=f"got {type(value).__name__} for 'm'"):
        MetricState().update({"m": value}, 1)


@pytest.mark.parametrize("value", [(1.0, None), (SumMetric(), 1.0), (SumMetric(),), (SumMetric(), (1.0,), None)])
def test_spec_11_a_pair_that_is_no_metric_with_its_arguments_is_a_type_error(value):
    with pytest.raises(SpecTypeError, match=r"must be \(metric_value, update_op\) tuples, .* for 'm'"):
        MetricState().update({"m": value}, 1)


@pytest.mark.parametrize("results", [None, [("m", 1.0)], 1.0])
def test_results_that_are_no_dict_are_a_type_error(results):
    with pytest.raises(SpecTypeError, match="metric_fn must return a dict of name -> metric; got"):
        check_metric_names(results)


@pytest.mark.parametrize("value", [SumMetric(), (SumMetric(), None)])
def test_spec_11_a_metric_that_was_never_updated_is_an_error(value):
    with pytest.raises(SpecError, match=r"Metric 'm' was never updated. Please call update\(...\) on it"):
        MetricState().update({"m": value}, 1)


@pytest.mark.parametrize(("first", "second"), [
    (1.0, (SumMetric(), (1.0,))), ((SumMetric(), (1.0,)), 1.0), ((SumMetric(), (1.0,)), (MeanMetric(), (1.0,)))])
def test_a_kind_that_changes_from_step_to_step_is_a_type_error(first, second):
    state = MetricState()
    state.update({"m": first}, 1)
    with pytest.raises(SpecTypeError, match="metric 'm' (changed its kind|was a Metric)"):
        state.update({"m": second}, 1)


class Nested(Metric):
    def __init__(self):
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, value):
        self.total += value

    def compute(self):
        return {"pair": (self.total, torch.tensor(1)), "list": [self.total * 2], "array": torch.arange(2)}


def test_eval_08_nested_results_keep_their_nesting_as_plain_numbers_and_arrays():
    state = MetricState()
    state.update({"n": (Nested(), (2.0,))}, 1)
    value = state.compute()["n"]
    assert value["pair"] == (2.0, 1)
    assert isinstance(value["pair"], tuple)
    assert [type(item) for item in value["pair"]] == [float, int]
    assert value["list"] == [4.0]
    assert isinstance(value["array"], np.ndarray)


def test_eval_08_metrics_are_updated_in_the_order_of_their_names():
    order: list[str] = []

    class Noting(SumMetric):
        def __init__(self, name):
            super().__init__()
            self.own_name = name

        def update(self, value):
            order.append(self.own_name)
            super().update(value)

    state = MetricState()
    state.update({name: (Noting(name), (1.0,)) for name in ("b", "c", "a")}, 1)
    assert order == ["a", "b", "c"]
    assert list(state.compute()) == ["a", "b", "c"]


def test_a_name_that_is_missing_in_some_steps_has_the_rows_of_the_others():
    state = MetricState()
    state.update({"a": 1.0, "b": 1.0}, 2)
    state.update({"a": 3.0}, 2)
    assert state.compute() == {"a": 2.0, "b": 1.0}


def test_nothing_gives_nothing():
    assert MetricState().compute() == {}


@pytest.mark.parametrize(("value", "plain"), [
    (torch.tensor(3), 3), (torch.tensor(0.5), 0.5), (torch.tensor(True), True), ("text", "text"),
    ((torch.tensor(1), [torch.tensor(2)]), (1, [2]))])
def test_plain_values_have_plain_types(value, plain):
    assert to_plain(value) == plain
    assert type(to_plain(value)) is type(plain)


def collection() -> MetricCollection:
    return MetricCollection({"mse": MeanSquaredError(), "mae": MeanAbsoluteError()})


def test_a_collection_is_updated_over_steps_and_gives_a_dict():
    state = MetricState()
    for x, y in ((torch.tensor([1.0, 2]), torch.tensor([1.0, 4])), (torch.tensor([5.0]), torch.tensor([8.0]))):
        state.update({"errors": (collection(), (x, y))}, len(x))
    assert state.compute() == {"errors": {"mse": pytest.approx(13 / 3), "mae": pytest.approx(5 / 3)}}


def test_a_collection_that_metric_fn_keeps_and_updates_is_reset_afterwards():
    state, kept = MetricState(), collection()
    for x, y in ((torch.tensor([1.0, 2]), torch.tensor([1.0, 4])), (torch.tensor([5.0]), torch.tensor([8.0]))):
        kept.update(x, y)
        state.update({"errors": kept}, len(x))
    assert state.compute()["errors"]["mae"] == pytest.approx(5 / 3)
    state.reset_owned()
    with pytest.raises(SpecError, match="'errors' was never updated"):
        state.update({"errors": kept}, 1)


def test_a_new_updated_collection_each_step_is_refused_with_the_mend():
    state = MetricState()
    with pytest.raises(SpecTypeError, match=r"MetricCollection, cannot be merged .*\(metric, arguments"):
        for _ in range(2):
            made = collection()
            made.update(torch.ones(1), torch.zeros(1))
            state.update({"errors": made}, 1)
