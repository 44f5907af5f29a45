from collections import Counter

import numpy as np
import pytest
import torch

from tpuspec import ModeKeys
from tpuspec.drain.metric_state import MetricState
from tpuspec.recipes import digits

PARAMS = {"width": 4, "dropout": 0.25, "learning_rate": 0.002, "weight_decay": 0.01}


@pytest.fixture(scope="module")
def split():
    return {mode: digits.load_split(mode) for mode in (ModeKeys.TRAIN, ModeKeys.EVAL)}


def test_split_holds_every_image_once(split):
    from sklearn.datasets import load_digits

    images = torch.cat([split[ModeKeys.TRAIN][0], split[ModeKeys.EVAL][0]]).reshape(-1, 64) * 16
    found = Counter(tuple(row) for row in images.int().tolist())
    assert found == Counter(tuple(row) for row in load_digits().data.astype(int).tolist())
    assert (len(split[ModeKeys.TRAIN][0]), len(split[ModeKeys.EVAL][0])) == (1437, 360)


def test_split_is_stratified(split):
    shares = [np.bincount(split[mode][1]) / len(split[mode][1]) for mode in (ModeKeys.TRAIN, ModeKeys.EVAL)]
    np.testing.assert_allclose(shares[0], shares[1], atol=0.003)


def test_split_is_the_same_each_time_and_in_predict(split):
    images, labels = digits.load_split(ModeKeys.PREDICT)
    assert torch.equal(images, split[ModeKeys.EVAL][0]) and torch.equal(labels, split[ModeKeys.EVAL][1])


def test_images_are_between_0_and_1(split):
    images = split[ModeKeys.TRAIN][0]
    assert images.shape[1:] == (1, 8, 8) and images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)


def test_predict_input_has_features_only():
    item = digits.input_fn(PARAMS, ModeKeys.PREDICT)[0]
    assert isinstance(item, torch.Tensor) and item.shape == (1, 8, 8)


@pytest.mark.parametrize("mode", [ModeKeys.TRAIN, ModeKeys.EVAL])
def test_input_has_features_and_labels(mode):
    image, label = digits.input_fn(PARAMS, mode)[0]
    assert image.shape == (1, 8, 8) and label.dtype == torch.int64


def make_spec(mode, *, labels):
    model = digits.model(PARAMS)
    return digits.model_fn(
        features=torch.rand(6, 1, 8, 8), labels=labels, mode=mode, params=PARAMS, model=model,
        optimizer=digits.optimizer(model, PARAMS) if mode == ModeKeys.TRAIN else None, global_step=torch.tensor([4]))


def test_train_spec_has_a_scalar_loss_and_a_host_call_of_vectors():
    spec = make_spec(ModeKeys.TRAIN, labels=torch.arange(6))
    assert spec.loss is not None and spec.loss.shape == ()
    step, loss, learning_rate = spec.host_call[1]
    assert step.tolist() == [4] and loss.shape == (1,)
    assert learning_rate.tolist() == pytest.approx([0.002])


def test_eval_loss_is_per_example_and_metrics_have_their_names():
    spec = make_spec(ModeKeys.EVAL, labels=torch.arange(6))
    assert spec.loss is not None and spec.loss.shape == (6,)
    metric_fn, tensors = spec.eval_metrics
    assert set(metric_fn(*tensors)) == {"accuracy", "recall_per_class"}


def test_metrics_are_accuracy_and_recall_of_each_class():
    labels = torch.tensor([0, 0, 1, 9])
    logits = torch.nn.functional.one_hot(torch.tensor([0, 1, 1, 9]), 10).float()
    state = MetricState()
    state.update(digits.metric_fn(labels, logits), num_rows=4)
    values = state.compute()
    assert values["accuracy"] == 0.75
    assert values["recall_per_class"].tolist() == [0.5, 1, 0, 0, 0, 0, 0, 0, 0, 1]


def test_predictions_are_probabilities_and_classes():
    predictions = make_spec(ModeKeys.PREDICT, labels=None).predictions
    assert predictions["probabilities"].shape == (6, 10) and predictions["classes"].shape == (6,)
    torch.testing.assert_close(predictions["probabilities"].sum(dim=1), torch.ones(6))


def test_summaries_are_written_at_the_completed_step(monkeypatch):
    written = []
    monkeypatch.setattr(digits.tpuspec.summary, "scalar", lambda *args, step: written.append((*args, step)))
    digits.write_summaries(torch.tensor([4, 4]), torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.5]))
    assert written == [("digits/loss", 2.0, 5), ("digits/learning_rate", 0.5, 5)]
