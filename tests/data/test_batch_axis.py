from __future__ import annotations

import collections

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.models import make_config, make_spec, make_trainer, run
from tests.several_replicas import use_fake
from tpuspec import InputPipelineConfig, ModeKeys, TPUConfig, TPUEstimatorSpec
from tpuspec.data.batch_axis import BatchAxis
from tpuspec.errors import ConfigError, ConfigTypeError
from tpuspec.spec.results import Batch

IMAGE, LABEL = torch.zeros(5, 6, 3, 4), torch.zeros(4)  # HWCN, N
Pair = collections.namedtuple("Pair", ["left", "right"])
both_paths = pytest.mark.parametrize("use_tpu", [True, False], ids=["xla", "native"])


@pytest.mark.parametrize(("given", "batch", "axes"), [
    (None, Batch(features=IMAGE, labels=LABEL), {}),
    ((3, 0), Batch(features=IMAGE, labels=LABEL), {"features": 3, "labels": 0}),
    ([3, 0], Batch(features=IMAGE, labels=LABEL), {"features": 3, "labels": 0}),
    ((-1, 0), Batch(features=IMAGE, labels=LABEL), {"features": 3, "labels": 0}),
    (1, Batch(features={"a": IMAGE, "b": IMAGE}), {"features['a']": 1, "features['b']": 1}),
    ((3, 2, 0), Batch(features=(IMAGE, IMAGE), labels=LABEL), {"features[0]": 3, "features[1]": 2, "labels": 0}),
    ((3, 2, 0), Batch(features=(IMAGE, IMAGE)), {"features[0]": 3, "features[1]": 2}),
    (({"b": 2, "a": 3}, 0), Batch(features={"a": IMAGE, "b": IMAGE}, labels=LABEL), {
        "features['a']": 3, "features['b']": 2, "labels": 0}),
    (({"a": Pair(3, 1)}, 0), Batch(features={"a": Pair(IMAGE, IMAGE)}, labels={"x": LABEL, "y": LABEL}), {
        "features['a'].left": 3, "features['a'].right": 1, "labels['x']": 0, "labels['y']": 0}),
    (({"a": 3}, 0), Batch(features={"a": IMAGE}), {"features['a']": 3})])
def test_each_tensor_has_its_axis(given, batch, axes):
    assert BatchAxis(given).axes(batch) == axes


@pytest.mark.parametrize(("given", "batch", "message"), [
    ((3,), Batch(features=IMAGE, labels=LABEL), r"an int for each tensor of the input, \['features', 'labels'\]; got"),
    ((3, 0, 0), Batch(features=IMAGE, labels=LABEL), r"\['features', 'labels'\]; got 3: \(3, 0, 0\)"),
    ((4, 0), Batch(features=IMAGE, labels=LABEL), r"of features must be an axis of its shape, \[5, 6, 3, 4\]; got 4"),
    ((3, -2), Batch(features=IMAGE, labels=LABEL), r"of labels must be an axis of its shape, \[4\]; got -2"),
    ((3, 2, 0), Batch(features={"a": IMAGE, "b": IMAGE}, labels=LABEL), r"a dict's have not.*Name them"),
    (({"a": 3, "c": 2}, 0), Batch(features={"a": IMAGE, "b": IMAGE}, labels=LABEL),
     r"of features must be an int or nested like them, \[\"features\['a'\]\", \"features\['b'\]\"\]"),
    ({"a": 3}, Batch(features={"a": IMAGE}), "must be an int for every tensor; one int a tensor")])
def test_what_does_not_fit_the_batch_is_named(given, batch, message):
    with pytest.raises(ConfigError, match=message):
        BatchAxis(given).axes(batch)


@pytest.mark.parametrize(("given", "kind"), [
    ("3", ConfigTypeError), ((3, 0.0), ConfigTypeError), (True, ConfigTypeError), (({"a": None}, 0), ConfigTypeError),
    ((), ConfigError), ({}, ConfigError)])
def test_what_is_no_axis_is_refused_when_the_trainer_is_made(tmp_path, given, kind):
    with pytest.raises(kind, match="^batch_axis must be an int for every tensor"):
        make_trainer(tmp_path, batch_axis=given)


def columns(count):
    """Features [2, rows], 10 * i and i in column i, and labels [rows]."""
    x = torch.arange(float(count))
    return torch.stack([10 * x, x]), x


def on_columns(features, labels, mode, params, model):
    """Sums each column; the host gets it, and the prediction."""
    sums = features.sum(0)
    if mode == ModeKeys.PREDICT:
        return TPUEstimatorSpec(mode, predictions={"sum": sums})
    return TPUEstimatorSpec(mode, loss=(sums - 11 * labels).abs() + labels, eval_metrics=(
        lambda sums: {"mean_sum": sums}, [sums]))


def column_batches(count, size):
    x, y = columns(count)
    return [(x[:, i:i + size], y[i:i + size]) for i in range(0, count, size)]


DEPLOYMENTS = ["PER_SHARD_V1", "PER_HOST_V1", "PER_HOST_V2", "BROADCAST", "SLICED"]


def deployed(name):
    deployment = InputPipelineConfig[name]
    return TPUConfig(eval_training_input_configuration=deployment) if name == "SLICED" else TPUConfig(
        per_host_input_for_training=deployment)


@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize("deployment", DEPLOYMENTS)
@pytest.mark.parametrize("count", [8, 11, 13])
def test_rows_on_another_axis_are_split_padded_and_evaluated_exactly(
        tmp_path, monkeypatch, replicas, deployment, count):
    fakes = use_fake(monkeypatch, replicas)
    trainer = make_trainer(tmp_path, on_columns, model=None, optimizer=None, eval_batch_size=8, predict_batch_size=8,
                           batch_axis=(1, 0), config=make_config(tpu_config=deployed(deployment)))
    result = trainer.evaluate(lambda params: column_batches(count, params["batch_size"]))
    assert result["mean_sum"] == pytest.approx(11 * (count - 1) / 2)
    assert result["loss"] == pytest.approx((count - 1) / 2)
    rows = trainer.predict(lambda params: [x for x, _ in column_batches(count, params["batch_size"])])
    assert [row["sum"].item() for row in rows] == [11 * i for i in range(count)]
    size = 8 if deployment == "BROADCAST" else 8 // replicas
    fed = [batch for step in fakes[0].fed for batch in step]
    assert {tuple(batch.features.shape) for batch in fed} == {(2, size)}


@both_paths
@pytest.mark.parametrize("form", ["Dataset", "DataLoader", "iterable"])
def test_every_form_of_input_serves(tmp_path, use_tpu, form):
    x, y = columns(7)

    def input_fn(params):
        dataset, size = TensorDataset(x.T, y), params["batch_size"]
        if form == "Dataset":  # collated here, along the asked axis
            return dataset
        if form == "DataLoader":
            return DataLoader(dataset, batch_size=size, collate_fn=lambda rows: (
                torch.stack([row[0] for row in rows], 1), torch.stack([row[1] for row in rows])))
        return column_batches(7, size)

    trainer = make_trainer(tmp_path, on_columns, model=None, optimizer=None, batch_axis=(1, 0), use_tpu=use_tpu)
    assert trainer.evaluate(input_fn)["mean_sum"] == 33
    assert [row["sum"].item() for row in trainer.predict(input_fn)] == [11 * i for i in range(7)]


@both_paths
def test_training_sees_the_tensors_as_they_are(tmp_path, use_tpu):
    shapes = set()

    def model_fn(features, labels, mode, params, model, optimizer):
        shapes.add(tuple(features.shape))
        return make_spec(mode, model(features.sum(0, keepdim=True).T), labels[:, None], optimizer)

    trainer = make_trainer(tmp_path, model_fn, batch_axis=(1, 0), use_tpu=use_tpu)
    trainer.train(lambda params: column_batches(8, 2), steps=4)
    trainer.train(lambda params: TensorDataset(columns(8)[0].T, columns(8)[1]), steps=2)
    assert shapes == {(2, 2)}
    assert trainer.global_step() == 6


@pytest.mark.parametrize(("batches", "message"), [
    ([(torch.ones(2, 3), torch.ones(3))], r"greater than batch_size, 2; got 3 rows"),
    ([(torch.ones(2, 1), torch.ones(2))], r"labels must be batch-major with the rows of features, 1; got shape \[2\]"),
    ([(torch.ones(2, 2), torch.ones(2)), (torch.ones(3, 2), torch.ones(2))],
     r"features changed from \[2, batch\] to \[3, batch\]"),
    ([(torch.ones(2, 2), torch.ones(2)), (torch.ones(2), torch.ones(2))],
     r"features must have its rows on axis 1; got shape \[2\]")])
def test_wrong_batches_are_named_by_their_axis(tmp_path, batches, message):
    trainer = make_trainer(tmp_path, on_columns, model=None, optimizer=None, batch_axis=(1, 0))
    with pytest.raises(ValueError, match=message):
        run(trainer, "evaluate", lambda params: batches)


def test_rows_on_another_axis_without_batch_axis_are_told_of_it(tmp_path):
    trainer = make_trainer(tmp_path, on_columns, model=None, optimizer=None)
    with pytest.raises(ValueError, match="Rows on another axis need batch_axis"):
        trainer.evaluate(lambda params: column_batches(3, 3))
