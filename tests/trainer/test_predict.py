"""Predictions: in order, without padding, and released when they are abandoned."""

from __future__ import annotations

import threading
from collections import UserDict

import numpy as np
import pytest
import torch

from tests.regression import (
    make_trainer,
    regression_rows,
    rows_input,
)
from tpuspec import TPUEstimatorSpec
from tpuspec.errors import ConfigError, SpecTypeError
from tpuspec.spec.phase import current_phase, phase_of, step_of


def test_predictions_keep_the_order_and_show_no_padding(tmp_path):
    trainer = make_trainer(tmp_path)
    rows = list(trainer.predict(rows_input(10)))
    np.testing.assert_array_equal([row["x"] for row in rows], regression_rows(10).tensors[0].numpy())
    batches = list(trainer.predict(rows_input(10), yield_single_examples=False, predict_keys=["y", "unknown"]))
    assert [list(batch) for batch in batches] == [["y"]] * 3
    assert [len(batch["y"]) for batch in batches] == [4, 4, 2]


@pytest.mark.parametrize("use_tpu", [True, False])
def test_strings_of_the_features_come_with_the_row_that_they_belong_to(tmp_path, use_tpu):
    def model_fn(features, mode, params, model):
        assert features["mask"] is None and sorted(features) == ["mask", "x"]
        return TPUEstimatorSpec(mode, predictions={"y": model(features["x"]), "x": features["x"]})

    def input_fn(params):
        x = torch.arange(10.0).reshape(-1, 1)
        return [UserDict(x=part, mask=None, name=[f"row {int(row)}" for row in part]) for part in x.split(4)]

    trainer = make_trainer(tmp_path, model_fn, use_tpu=use_tpu)
    rows = list(trainer.predict(input_fn))
    assert [(row["name"], float(row["x"][0])) for row in rows] == [(f"row {i}", float(i)) for i in range(10)]
    assert [sorted(row) for row in trainer.predict(input_fn, predict_keys=["name"])] == [["name"]] * 10
    last = list(trainer.predict(input_fn, yield_single_examples=False))[-1]
    assert last["name"].tolist() == ["row 8", "row 9"]


def test_an_abandoned_prediction_releases_everything(tmp_path):
    calls = []

    def model_fn(features, mode, params, model):
        return TPUEstimatorSpec(mode, predictions={"y": model(features)},
                                host_call=(lambda y: calls.append(len(y)), [model(features)]))

    trainer = make_trainer(tmp_path, model_fn)
    generator = trainer.predict(lambda params: [regression_rows(4).tensors[0]] * 100)
    next(generator)
    generator.close()
    assert calls and calls[0] == 4
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tpuspec")]


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_integers_that_xla_gives_back_signed_are_refused_by_name(dtype, tmp_path):
    def passing_on(features, mode, params, model):
        return TPUEstimatorSpec(mode, predictions={"x": features["x"]})

    def making(features, mode, params, model):
        return TPUEstimatorSpec(mode, predictions={"x": features["x"].to(dtype)})

    x = torch.tensor([250, 1, 2, 3])
    with pytest.raises(SpecTypeError, match=r"features\['x'\] must not hold torch.uint.*astype\('int"):
        next(make_trainer(tmp_path, passing_on).predict(lambda params: [{"x": x.to(dtype)}]))
    with pytest.raises(SpecTypeError, match="the spec must not hold torch.uint"):
        next(make_trainer(tmp_path, making).predict(lambda params: [{"x": x}]))
    row = next(make_trainer(tmp_path, passing_on).predict(lambda params: [{"x": x.to(torch.uint8)}]))
    assert row["x"] == 250
    assert row["x"].dtype == np.uint8


@pytest.mark.parametrize("use_tpu", [True, False])
def test_an_input_may_use_its_memory_again(use_tpu, tmp_path):
    def reusing(params):
        array = np.zeros((4, 1), dtype=np.float32)
        for i in range(4):
            array[:] = i
            yield array

    def model_fn(features, mode, params, model):
        return TPUEstimatorSpec(mode, predictions={"x": features * 1, "same": features})

    trainer = make_trainer(tmp_path, model_fn, use_tpu=use_tpu)
    rows = list(trainer.predict(reusing))
    assert [row["x"].item() for row in rows] == [row["same"].item() for row in rows] == [i for i in range(4)
                                                                                         for _ in range(4)]


def test_a_second_prediction_while_one_is_open_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    first = trainer.predict(rows_input())
    next(first)
    with pytest.raises(ConfigError, match=r"predict\(\) cannot go on while a predict\(\) generator is open"):
        next(trainer.predict(rows_input()))
    assert len(list(first)) == 15
    assert len(list(trainer.predict(rows_input()))) == 16


@pytest.mark.parametrize("use_tpu", [True, False])
def test_an_error_of_the_input_names_its_part_and_its_step_behind_the_batches_before(use_tpu, tmp_path):
    phases, predictions = [], []

    def input_fn(params):
        for number in range(3):
            phases.append(current_phase())
            yield torch.full((4, 1), float(number))
        raise ZeroDivisionError("by the test")

    with pytest.raises(ZeroDivisionError, match="by the test") as caught:
        predictions.extend(make_trainer(tmp_path, use_tpu=use_tpu, prefetch_batches=0).predict(input_fn))
    assert len(predictions) == 12
    assert (phase_of(caught.value, ""), step_of(caught.value)) == ("input_fn", 4)
    assert phases == ["input_fn"] * 3, "which a watchdog that ends a hang names"
