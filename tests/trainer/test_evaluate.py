"""Evaluation: exact over all rows, and without a trace in training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score
from torch import nn
from torch.utils.data import TensorDataset

import tpuspec
from tests.regression import (
    batch_norm_net,
    make_trainer,
    num_compiles,
    regression_rows,
    rows_input,
    scalars,
)
from tpuspec import ModeKeys, TPUEstimatorSpec


def test_evaluation_of_all_digits_equals_accuracy_score_and_compiles_nothing_for_the_last_batch(tmp_path):
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).reshape(-1, 64) / 16
    labels = torch.tensor(digits.target)

    def model_fn(features, labels, mode, params, model):
        logits = model(features)
        if mode == ModeKeys.PREDICT:
            return TPUEstimatorSpec(mode, predictions={"class": logits.argmax(1)})
        return TPUEstimatorSpec(mode, loss=F.cross_entropy(logits, labels, reduction="none"), eval_metrics=(
            lambda labels, classes: {"accuracy": labels == classes}, [labels, logits.argmax(1)]))

    trainer = make_trainer(tmp_path, model_fn, batch_size=64, model=lambda params: nn.Linear(64, 10))
    trainer.evaluate(lambda params: TensorDataset(images[:128], labels[:128]))
    compiled = num_compiles()

    result = trainer.evaluate(lambda params: TensorDataset(images, labels))

    assert num_compiles() == compiled, "1797 = 28 x 64 + 5 rows must reuse the graph of full batches"
    classes = [row["class"] for row in trainer.predict(lambda params: TensorDataset(images, labels))]
    assert result["accuracy"] == accuracy_score(digits.target, classes)
    assert 0 < result["accuracy"] < 1


def test_loss_of_an_evaluation_is_the_mean_over_real_rows(tmp_path):
    trainer = make_trainer(tmp_path)
    result = trainer.evaluate(rows_input(11))
    weights = {name: trainer._sessions[True].module.state_dict()[name].cpu() for name in ("weight", "bias")}
    x, y = regression_rows(11).tensors
    expected = F.mse_loss(x @ weights["weight"].T + weights["bias"], y)
    assert result["loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_evaluation_during_training_leaves_no_trace_in_it(tmp_path):
    def model(params):
        return nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))

    plain = make_trainer(tmp_path / "plain", model=model)
    plain.train(rows_input(), max_steps=8)
    watched = make_trainer(tmp_path / "watched", model=model, save_checkpoints_steps=2)
    results = []

    class Evaluate(tpuspec.CheckpointSaverListener):
        def after_save(self, global_step):
            results.append(watched.evaluate(rows_input(7))["global_step"])
            results.append(watched.evaluate(rows_input(7), checkpoint_path=tmp_path / "watched/checkpoint-0")[
                "global_step"])

    watched.train(rows_input(), max_steps=8, saving_listeners=[Evaluate()])
    assert results == [0, 0, 2, 0, 4, 0, 6, 0, 8, 0]
    for name in plain.get_variable_names():
        np.testing.assert_array_equal(plain.get_variable_value(name), {
            "global_step": np.asarray(8)}.get(name, watched.get_variable_value(name)), err_msg=name)


@pytest.mark.parametrize("as_module", [True, False])
def test_evaluation_on_the_cpu_of_a_model_trained_on_xla(as_module, tmp_path):
    model = nn.Linear(1, 1) if as_module else lambda params: nn.Linear(1, 1)
    trainer = make_trainer(tmp_path, model=model, eval_on_tpu=False, save_checkpoints_secs=None)
    trainer.train(rows_input(), max_steps=10)
    assert trainer.latest_checkpoint() is None
    on_cpu = trainer.evaluate(rows_input(11))
    assert on_cpu["global_step"] == 10, "the newest weights are those in memory"
    predictions = np.stack([row["y"] for row in trainer.predict(rows_input(11))])
    y = regression_rows(11).tensors[1]
    assert on_cpu["mean_error"] == pytest.approx(np.abs(predictions - y.numpy()).mean(), rel=1e-4)


def test_summaries_of_training_and_evaluation(tmp_path):
    trainer = make_trainer(tmp_path, save_summary_steps=5, log_step_count_steps=10)
    trainer.train(rows_input(), max_steps=22)
    trainer.evaluate(rows_input(), name="held out")
    assert scalars(tmp_path) == {
        "loss": [5, 10, 15, 20, 22], "global_step/sec": [10, 20, 22], "examples/sec": [10, 20, 22]}
    assert scalars(tmp_path / "eval_held out") == {"mean_error": [22], "loss": [22], "checkpoint_path": [22]}


def test_a_metric_of_the_users_own_shows_no_trace_of_the_rehearsal_on_zeros(tmp_path):
    from torchmetrics import MeanMetric

    own = MeanMetric()

    def model_fn(features, labels, mode, params, model):
        def metric_fn(labels):
            own.update(labels)
            if not labels.any():
                raise ValueError("only one class")
            return {"own": own}

        return TPUEstimatorSpec(mode, loss=labels.squeeze(1), eval_metrics=(metric_fn, [labels]))

    trainer = make_trainer(tmp_path, model_fn)
    x = torch.ones(6, 1)
    for _ in range(2):
        assert trainer.evaluate(lambda params: TensorDataset(x, x))["own"] == 1.0


def test_metric_fn_is_tried_on_zeros_by_the_first_evaluation_only(tmp_path):
    seen = []

    def model_fn(features, labels, mode, params, model):
        def metric_fn(labels):
            seen.append(labels.sum().item())
            return {"mean": labels}

        return TPUEstimatorSpec(mode, loss=labels.squeeze(1), eval_metrics=(metric_fn, [labels]))

    trainer = make_trainer(tmp_path, model_fn)
    x = torch.ones(8, 1)
    for _ in range(3):
        trainer.evaluate(lambda params: TensorDataset(x, x))
    assert seen == [0, 4, 4, 4, 4, 4, 4]
    with pytest.raises(tpuspec.errors.SpecError, match="`loss` is not allowed"):
        make_trainer(tmp_path / "other", lambda features, mode, params: TPUEstimatorSpec(
            mode, loss=features.squeeze(1), eval_metrics=(lambda rows: {"loss": rows}, [features]))).evaluate(
                lambda params: [x[:4]])


def test_named_evaluations_replay_one_captured_step_from_their_first_batch_on(tmp_path):
    trainer = make_trainer(tmp_path, capture="require")
    trainer.evaluate(rows_input(16))  # four batches: traced until two traces are equal, then replayed
    compiled, results = num_compiles(), []
    for name in ("a", "b", "c"):
        results.append(trainer.evaluate(rows_input(4), name=name))
        assert trainer._sessions[True].backend.step_kind == "replay"
    assert num_compiles() == compiled
    assert results[0] == results[1] == results[2]


def test_an_evaluation_within_training_leaves_each_submodules_mode(tmp_path):
    modes = []
    trainer = make_trainer(tmp_path, model=batch_norm_net)

    class Freeze(tpuspec.SessionRunHook):
        def before_run(self, context):
            context.model[2].eval()

        def after_run(self, context):
            trainer.evaluate(rows_input())
            modes.append([part.training for part in context.model])

    trainer.train(rows_input(), hooks=[Freeze()], max_steps=4)
    assert modes == [[True, True, False, True]] * 2


def test_float64_input_is_warned_of(tmp_path, caplog):
    make_trainer(tmp_path, lambda features, mode, params, model: TPUEstimatorSpec(
        mode, loss=model(features.float()).squeeze(1))).evaluate(lambda params: [np.zeros((4, 1))])
    assert "input_fn yields float64" in caplog.text


def test_a_model_that_is_built_to_evaluate_without_xla_leaves_training_its_random_state(tmp_path):
    drawn = []
    for evaluates in (True, False):
        trainer = make_trainer(tmp_path / str(evaluates), model=batch_norm_net, eval_on_tpu=False,
                               save_checkpoints_steps=2)
        if evaluates:
            eval_spec = tpuspec.EvalSpec(rows_input(), throttle_secs=0)
            tpuspec.train_and_evaluate(trainer, tpuspec.TrainSpec(rows_input(), 4), eval_spec)
        else:
            trainer.train(rows_input(), max_steps=4)
        drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[1]
