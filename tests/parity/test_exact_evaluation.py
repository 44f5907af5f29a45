"""Whatever the size, replicas and deployment, evaluate and predict give what one process gives on the whole set."""

from __future__ import annotations

import tempfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix
from torch.utils.data import TensorDataset

import tpuspec
from tests.models import make_config, make_trainer
from tests.several_replicas import use_fake
from tpuspec import InputPipelineConfig, ModeKeys, TPUConfig, TPUEstimatorSpec
from tpuspec.errors import InputError

DEPLOYMENTS = [*InputPipelineConfig]
NUM_CLASSES = 3


def table(num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randn(num_rows, NUM_CLASSES, generator=generator), torch.randint(
        0, NUM_CLASSES, (num_rows,), generator=generator)


def confusion(labels, logits):
    cells = torch.nn.functional.one_hot(labels * NUM_CLASSES + logits.argmax(1), NUM_CLASSES ** 2)
    return {"accuracy": tpuspec.metrics.accuracy(labels, logits.argmax(1)),
            "cells": cells.reshape(-1, NUM_CLASSES, NUM_CLASSES)}


def model_fn(features, labels, mode, params):
    if mode == ModeKeys.PREDICT:
        return TPUEstimatorSpec(mode, predictions={"logits": features * 1})
    losses = torch.nn.functional.cross_entropy(features, labels, reduction="none")
    return TPUEstimatorSpec(mode, loss=losses, eval_metrics=(confusion, [labels, features]))


def configured(deployment: InputPipelineConfig) -> TPUConfig:
    if deployment is InputPipelineConfig.SLICED:  # of evaluation and prediction only
        return TPUConfig(eval_training_input_configuration=deployment)
    return TPUConfig(per_host_input_for_training=deployment)


def check(folder: str, num_rows: int, batch_size: int, deployment: InputPipelineConfig) -> None:
    trainer = make_trainer(folder, model_fn, model=None, optimizer=None, eval_batch_size=batch_size,
                           predict_batch_size=batch_size, config=make_config(tpu_config=configured(deployment)))
    logits, labels = table(num_rows)
    if num_rows == 0:
        for run in (trainer.evaluate, lambda input_fn: list(trainer.predict(input_fn))):
            with pytest.raises(InputError, match="input_fn yielded no batches"):
                run(lambda params: TensorDataset(logits, labels))
        return
    result = trainer.evaluate(lambda params: TensorDataset(logits, labels))
    guesses = logits.argmax(1)
    assert result["accuracy"] == float((guesses == labels).double().mean())
    counts = result["cells"] * num_rows
    np.testing.assert_allclose(counts, confusion_matrix(labels, guesses, labels=range(NUM_CLASSES)), rtol=0, atol=1e-9)
    expected = torch.nn.functional.cross_entropy(logits.double(), labels).item()
    assert result["loss"] == pytest.approx(expected, abs=1e-6, rel=1e-6)
    rows = list(trainer.predict(lambda params: TensorDataset(logits, labels)))
    np.testing.assert_array_equal(np.stack([row["logits"] for row in rows]), logits.numpy())


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(num_rows=st.integers(0, 200), per_replica=st.integers(1, 25), replicas=st.sampled_from([1, 2, 4]),
       deployment=st.sampled_from(DEPLOYMENTS))
def test_counts_means_and_rows_are_those_of_one_process(num_rows, per_replica, replicas, deployment):
    with pytest.MonkeyPatch.context() as monkeypatch, tempfile.TemporaryDirectory() as folder:
        use_fake(monkeypatch, replicas)
        check(folder, num_rows, per_replica * replicas, deployment)


@pytest.mark.parametrize(("num_rows", "batch_size"), [(1, 8), (8, 8), (29, 8), (200, 16)])
def test_on_xla_too_and_one_graph_a_mode_is_compiled(tmp_path, num_rows, batch_size):
    from tests.regression import num_compiles

    trainer = make_trainer(tmp_path, model_fn, model=None, optimizer=None, eval_batch_size=batch_size,
                           predict_batch_size=batch_size)
    check(str(tmp_path / "checked"), num_rows, batch_size, InputPipelineConfig.PER_HOST_V1)
    before = num_compiles()
    for _ in range(2):
        trainer.evaluate(lambda params: TensorDataset(*table(num_rows)))
        list(trainer.predict(lambda params: TensorDataset(*table(num_rows))))
    assert num_compiles() - before <= 2
