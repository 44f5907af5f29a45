"""Rows PRED-01 .. PRED-13 of the conformance list: predict()."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from tests.models import StepRecorder, input_fn, make_config, make_spec, make_trainer
from tests.several_replicas import use_fake
from tpuspec import InputPipelineConfig, ModeKeys, TPUConfig, TPUEstimatorSpec

V1, V2, BROADCAST = InputPipelineConfig.PER_HOST_V1, InputPipelineConfig.PER_HOST_V2, InputPipelineConfig.BROADCAST
both_paths = pytest.mark.parametrize("use_tpu", [True, False], ids=["xla", "native"])


def echo(features, mode, params):
    """Predicts the features themselves."""
    return TPUEstimatorSpec(mode, predictions={"x": features * 1})


def echo_trainer(tmp_path, model_fn=echo, **arguments):
    return make_trainer(tmp_path, model_fn, model=None, optimizer=None, **arguments)


def numbers(count):
    return lambda params: list(torch.arange(float(count)).reshape(-1, 1).split(params["batch_size"]))


def values(rows):
    return [row["x"].item() for row in rows]


def one_tensor(features, mode, params):
    return TPUEstimatorSpec(mode, predictions=features * 1)


def test_pred_01_on_xla_predictions_must_be_a_dict(tmp_path):
    with pytest.raises(TypeError, match=r"TPUEstimatorSpec.predictions must be dict of Tensors"):
        next(echo_trainer(tmp_path, one_tensor).predict(numbers(4)))


def test_pred_01_without_xla_one_tensor_yields_its_rows(tmp_path):
    rows = list(echo_trainer(tmp_path, one_tensor, use_tpu=False).predict(numbers(4)))
    assert [row.tolist() for row in rows] == [[0], [1], [2], [3]]


@both_paths
def test_pred_01_one_batch_in_the_place_of_an_input_is_refused(tmp_path, use_tpu):
    with pytest.raises(ValueError, match="should return a Dataset, a DataLoader or an iterable of batches; got one"):
        next(echo_trainer(tmp_path, use_tpu=use_tpu).predict(lambda params: (torch.ones(2, 1), torch.ones(2, 1))))


@both_paths
def test_pred_01_better_batch_axis_serves_in_predict_too(tmp_path, use_tpu):
    """TPUEstimator refuses it there, with a TypeError."""
    def transposed(features, mode, params):
        return TPUEstimatorSpec(mode, predictions={"x": features.T * 1})

    trainer = echo_trainer(tmp_path, transposed, use_tpu=use_tpu, batch_axis=1)
    assert values(trainer.predict(lambda params: [part.T for part in numbers(5)(params)])) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("reduced", [lambda x: x.mean(), lambda x: x[:1]], ids=["scalar", "short"])
def test_pred_02_predictions_must_have_the_batchs_rows_and_the_key_is_named(tmp_path, reduced):
    def model_fn(features, mode, params):
        return TPUEstimatorSpec(mode, predictions={"fine": features, "broken": reduced(features)})

    with pytest.raises(ValueError, match=r"tensor with key \(broken\) in TPUEstimatorSpec.predictions must be batch-"):
        next(echo_trainer(tmp_path, model_fn).predict(numbers(4)))


@pytest.mark.parametrize(("deployment", "count"), [(V1, 16), (V2, 16), (V2, 24), (BROADCAST, 16), (V1, 13), (V2, 9)])
def test_pred_03_every_row_comes_once_from_two_replicas_with_every_deployment(tmp_path, monkeypatch, deployment, count):
    use_fake(monkeypatch, 2)
    trainer = echo_trainer(tmp_path, predict_batch_size=16, config=make_config(
        tpu_config=TPUConfig(per_host_input_for_training=deployment)))
    assert values(trainer.predict(numbers(count))) == list(range(count))


def test_pred_04_a_short_last_batch_is_filled_with_zero_rows_behind_the_real_one(tmp_path, monkeypatch):
    fakes = use_fake(monkeypatch, 1)
    rows = [{"a": torch.full((n, 1), 7.0), "b": torch.full((n, 2), 8)} for n in (2, 2, 1)]

    def model_fn(features, mode, params):
        return TPUEstimatorSpec(mode, predictions=dict(features))

    trainer = echo_trainer(tmp_path, model_fn, predict_batch_size=2)
    assert len(list(trainer.predict(lambda params: rows))) == 5
    last = fakes[0].fed[-1][0].features
    assert (last["a"].tolist(), last["b"].tolist()) == ([[7], [0]], [[8, 8], [0, 0]])


@both_paths
@pytest.mark.parametrize("count", [4, 3])
def test_pred_05_nothing_but_the_inputs_batches_reaches_the_user(tmp_path, use_tpu, count):
    batches = list(echo_trainer(tmp_path, use_tpu=use_tpu).predict(numbers(count), yield_single_examples=False))
    assert [batch["x"].shape for batch in batches] == [(2, 1), (count - 2, 1)]


@both_paths
def test_pred_06_the_last_batch_is_short(tmp_path, use_tpu):
    batches = list(echo_trainer(tmp_path, use_tpu=use_tpu).predict(numbers(3), yield_single_examples=False))
    assert [batch["x"].flatten().tolist() for batch in batches] == [[0, 1], [2]]


def test_pred_07_a_partly_filled_step_of_per_host_v2_is_completed_with_padding(tmp_path, monkeypatch):
    fakes = use_fake(monkeypatch, 2)
    trainer = echo_trainer(tmp_path, predict_batch_size=4, config=make_config(
        tpu_config=TPUConfig(per_host_input_for_training=V2)))
    batches = list(trainer.predict(lambda params: [torch.ones(2, 1), torch.ones(2, 1), torch.ones(1, 1)],
                                   yield_single_examples=False))
    assert [len(batch["x"]) for batch in batches] == [4, 1]
    assert [part.features.flatten().tolist() for part in fakes[0].fed[-1]] == [[1, 0], [0, 0]]


@pytest.mark.parametrize(("sizes", "message"), [
    ((3,), "real batch size should not be greater than batch_size, 2; got 3 rows"),
    ((1, 2), "only the last batch may be short")])
def test_pred_08_too_large_batches_and_rows_behind_a_short_one_are_refused(tmp_path, sizes, message):
    with pytest.raises(ValueError, match=message):
        list(echo_trainer(tmp_path).predict(lambda params: [torch.ones(size, 1) for size in sizes]))


@both_paths
def test_pred_09_rows_come_in_the_order_of_the_dataset(tmp_path, use_tpu):
    rows = TensorDataset(torch.arange(33.0).reshape(-1, 1), torch.zeros(33))
    assert values(echo_trainer(tmp_path, use_tpu=use_tpu).predict(lambda params: rows)) == list(range(33))


def test_pred_09_a_cpu_trainer_on_the_same_model_dir_predicts_the_same(tmp_path):
    on_xla = make_trainer(tmp_path).train(input_fn, steps=3)
    predicted = [row["outputs"].item() for row in on_xla.predict(numbers(16))]
    on_cpu = make_trainer(tmp_path, use_tpu=False)
    assert [row["outputs"].item() for row in on_cpu.predict(numbers(16))] == pytest.approx(predicted, abs=0.01)


@both_paths
def test_pred_10_batches_or_rows_as_asked_and_input_fn_once_a_call(tmp_path, use_tpu):
    calls = []

    def counted(params):
        calls.append(1)
        return numbers(4)(params)

    trainer = echo_trainer(tmp_path, use_tpu=use_tpu)
    batch = next(trainer.predict(counted, yield_single_examples=False))
    assert isinstance(batch["x"], np.ndarray) and batch["x"].shape == (2, 1)
    assert len(calls) == 1
    assert next(trainer.predict(counted))["x"].shape == (1,)
    assert len(calls) == 2


@both_paths
def test_pred_10_an_explicit_checkpoint_is_used(tmp_path, use_tpu):
    trained = make_trainer(tmp_path / "a", use_tpu=use_tpu).train(input_fn, steps=5)
    fresh = make_trainer(tmp_path / "b", use_tpu=use_tpu)
    expected = [row["outputs"].item() for row in trained.predict(numbers(4))]
    assert [row["outputs"].item() for row in fresh.predict(numbers(4))] != expected
    given = fresh.predict(numbers(4), checkpoint_path=trained.latest_checkpoint())
    assert [row["outputs"].item() for row in given] == expected


@both_paths
def test_pred_10_an_endless_input_serves_as_many_rows_as_are_asked_for(tmp_path, use_tpu):
    generator = echo_trainer(tmp_path, use_tpu=use_tpu).predict(
        lambda params: (torch.full((2, 1), float(i)) for i in itertools.count()))
    assert values(itertools.islice(generator, 50)) == [i // 2 for i in range(50)]
    generator.close()


def several(features, mode, params):
    return TPUEstimatorSpec(mode, predictions={"x": features * 1, "y": features * 2, "z": features * 3})


@both_paths
def test_pred_11_only_the_named_keys_come_and_unknown_ones_are_ignored(tmp_path, use_tpu):
    rows = list(echo_trainer(tmp_path, several, use_tpu=use_tpu).predict(numbers(3), predict_keys=["z", "x", "none"]))
    assert [set(row) for row in rows] == [{"x", "z"}] * 3


@both_paths
def test_pred_11_no_key_that_matches_is_a_value_error(tmp_path, use_tpu):
    with pytest.raises(ValueError, match="Expected to run at least one output from"):
        next(echo_trainer(tmp_path, several, use_tpu=use_tpu).predict(numbers(3), predict_keys=["none"]))


def test_pred_11_keys_for_predictions_without_names_are_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="predict_keys argument is not valid in case of non-dict predictions"):
        next(echo_trainer(tmp_path, one_tensor, use_tpu=False).predict(numbers(3), predict_keys=["x"]))


def test_pred_11_unequal_numbers_of_rows_are_a_value_error(tmp_path):
    def model_fn(features, mode, params):
        return TPUEstimatorSpec(mode, predictions={"x": features * 1, "y": features[:1]})

    with pytest.raises(ValueError, match="Batch length of predictions should be same"):
        next(echo_trainer(tmp_path, model_fn, use_tpu=False).predict(numbers(2)))


@both_paths
def test_pred_12_nothing_happens_before_the_first_next(tmp_path, use_tpu):
    generator = make_trainer(tmp_path, use_tpu=use_tpu).predict(lambda: pytest.fail("was called"), hooks=["no hook"])
    with pytest.raises(TypeError, match="must be.*SessionRunHook"):
        next(generator)


@both_paths
def test_pred_12_hooks_fire_once_a_batch_when_it_is_yielded(tmp_path, use_tpu):
    recorder = StepRecorder()
    generator = echo_trainer(tmp_path, use_tpu=use_tpu).predict(numbers(6), hooks=[recorder])
    counts = [(next(generator), len(recorder.before), len(recorder.after))[1:] for _ in range(5)]
    assert counts == [(1, 1), (1, 1), (2, 2), (2, 2), (3, 3)]
    generator.close()


@both_paths
@pytest.mark.parametrize("labelled", [False, True])
def test_pred_13_the_input_may_yield_features_alone_or_with_labels_which_are_dropped(tmp_path, use_tpu, labelled):
    seen = []

    def model_fn(features, labels, mode, params):
        seen.append(labels)
        return make_spec(mode, features, labels, None, predictions={"x": features})

    x = torch.arange(4.0).reshape(2, 2, 1)
    rows = echo_trainer(tmp_path, model_fn, use_tpu=use_tpu).predict(
        lambda params: [(batch, batch) if labelled else batch for batch in x])
    assert values(rows) == [0, 1, 2, 3]
    assert set(seen) == {None}
    assert ModeKeys.PREDICT == "infer"
