"""Rows HOST-01 .. HOST-09 of the conformance list: host_call, summaries, throughput."""

from __future__ import annotations

import json
import re

import pytest
import torch

import tpuspec
from tests.models import make_config, make_spec, make_trainer
from tests.several_replicas import use_fake
from tpuspec import InputPipelineConfig, ModeKeys, TPUConfig, TPUEstimatorSpec

both_paths = pytest.mark.parametrize("use_tpu", [True, False], ids=["xla", "native"])


def summarizing(seen):
    """A model_fn whose host_call notes the step, and writes it on every fifth."""
    def host_call(step):
        seen.append(int(step[0]))
        if seen[-1] % 5 == 0:
            tpuspec.summary.scalar("step", step[0], step=step)

    def model_fn(features, labels, mode, params, model, optimizer, global_step):
        return make_spec(mode, model(features), labels, optimizer, host_call=(host_call, [global_step]))

    return model_fn


def batches(count):
    return lambda params: [(torch.ones(2, 1), torch.zeros(2, 1))] * count


def written(folder, name):
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [entry["step"] for entry in entries if entry["name"] == name]


def trained(folder, seen, *, every=1, use_tpu=True):
    trainer = make_trainer(folder, summarizing(seen), use_tpu=use_tpu, config=make_config(
        tpu_config=TPUConfig(iterations_per_loop=21, host_call_every_n_steps=every), save_checkpoints_secs=None))
    return trainer.train(batches(42), steps=42)


def test_host_01_host_call_runs_on_every_step_and_sees_the_step_before_its_update(tmp_path):
    trained(tmp_path, seen := [])
    assert seen == list(range(42))
    assert written(tmp_path, "step") == list(range(0, 45, 5))


def test_host_02_better_every_n_steps_counts_global_steps_over_loops(tmp_path):
    trainer = trained(tmp_path, seen := [], every=2)
    assert seen == list(range(0, 42, 2))  # TPUEstimator begins anew in each loop: 0, 2, .. 20, 21, 23, ..
    assert written(tmp_path, "step") == [0, 10, 20, 30, 40]
    trainer.train(batches(45), steps=3)
    assert seen[21:] == [42, 44]


def test_host_03_without_xla_every_n_is_ignored(tmp_path):
    trained(tmp_path, seen := [], every=2, use_tpu=False)
    assert seen == list(range(42))


@both_paths
def test_host_04_in_eval_host_call_runs_on_every_step_at_the_evaluated_global_step(tmp_path, use_tpu):
    trainer = trained(tmp_path, seen := [], every=2, use_tpu=use_tpu)
    seen.clear()
    trainer.evaluate(batches(9), steps=7)
    assert seen == [42] * 7


@both_paths
def test_host_05_host_call_comes_after_the_update_with_the_step_before_it(tmp_path, use_tpu):
    seen = []

    def model_fn(features, labels, mode, params, model, optimizer, global_step):
        outputs = model(features)
        loss = (outputs - labels).square().mean()

        def train_op():
            loss.backward()
            tpuspec.CrossShardOptimizer(optimizer).step()
            optimizer.zero_grad()

        return TPUEstimatorSpec(mode, loss=loss, train_op=train_op, host_call=(
            lambda step, weight: seen.append((int(step[0]), weight.item())), [global_step, model.weight.reshape(1)]))

    trainer = make_trainer(tmp_path, model_fn, use_tpu=use_tpu)
    for step in range(3):
        trainer.train(batches(3), steps=1)
        assert seen[-1] == (step, pytest.approx(trainer.get_variable_value("weight").item()))


def gathering(seen, *tensors):
    def host_call(*arrived):
        seen.append([tensor.tolist() for tensor in arrived])

    def model_fn(features, mode, params, global_step):
        return TPUEstimatorSpec(mode, predictions={"x": features}, host_call=(
            host_call, [tensor(features, global_step) for tensor in tensors]))

    return model_fn


@pytest.mark.parametrize(("deployment", "expected"), [
    (InputPipelineConfig.PER_HOST_V1, [[0, 0], [0, 1, 2, 3]]), (InputPipelineConfig.BROADCAST, [[0], [0, 1, 2, 3]])])
def test_host_06_tensors_are_concatenated_over_replicas_in_order(tmp_path, monkeypatch, deployment, expected):
    use_fake(monkeypatch, 2)
    model_fn = gathering(seen := [], lambda x, step: step, lambda x, step: x)
    trainer = make_trainer(tmp_path, model_fn, predict_batch_size=4, config=make_config(
        tpu_config=TPUConfig(per_host_input_for_training=deployment)))
    list(trainer.predict(lambda params: [torch.arange(4.0)]))
    assert seen == [expected]


def test_host_06_a_scalar_is_a_runtime_error_that_names_it_and_the_mend(tmp_path):
    model_fn = gathering([], lambda x, step: step, lambda x, step: x.sum())
    with pytest.raises(RuntimeError, match=r"should preserve batch size dimension, but got scalar '1'. Reshape it to "
                                           r"\[1\]: tensor.reshape\(1\)"):
        next(make_trainer(tmp_path, model_fn).predict(lambda params: [torch.ones(2)]))


def test_host_06_without_xla_a_scalar_is_allowed(tmp_path):
    model_fn = gathering(seen := [], lambda x, step: x.sum())
    list(make_trainer(tmp_path, model_fn, use_tpu=False).predict(lambda params: [torch.ones(2)]))
    assert seen == [[2.0]]


@pytest.mark.parametrize("tensors", [[], {}])
def test_host_07_a_host_call_without_tensors_is_ignored_in_train(tmp_path, tensors):
    def model_fn(features, labels, mode, params, model, optimizer):
        return make_spec(mode, model(features), labels, optimizer,
                         host_call=(lambda: pytest.fail("was called"), tensors))

    make_trainer(tmp_path, model_fn).train(batches(2), steps=2)


@both_paths
def test_host_07_host_call_works_in_predict_and_may_return_anything(tmp_path, use_tpu):
    seen = []

    def model_fn(features, mode, params):
        return TPUEstimatorSpec(mode, predictions={"x": features},
                                host_call=(lambda x: [seen.append(x.tolist())], {"x": features * 1}))

    trainer = make_trainer(tmp_path, model_fn, use_tpu=use_tpu)
    list(trainer.predict(lambda params: [torch.tensor([1.0, 2]), torch.tensor([3.0])]))
    assert seen == [[1, 2], [3]]


@pytest.mark.parametrize("summary_steps", [1, 0, None])
def test_host_08_throughput_is_written_unless_there_are_no_summaries(tmp_path, summary_steps):
    make_trainer(tmp_path, config=make_config(
        log_step_count_steps=10, save_summary_steps=summary_steps,
        tpu_config=TPUConfig(iterations_per_loop=5))).train(batches(30), steps=30)
    log = tmp_path / "metrics.jsonl"
    if not summary_steps:
        assert not log.exists() or not re.search("global_step/sec|examples/sec", log.read_text())
        return
    assert written(tmp_path, "global_step/sec") == written(tmp_path, "examples/sec") == [10, 20, 30]
    entries = {(e["name"], e["step"]): e["value"] for e in map(json.loads, log.read_text().splitlines())}
    for step in (10, 20, 30):
        assert entries["examples/sec", step] == pytest.approx(2 * entries["global_step/sec", step])


def test_host_09_a_loss_summary_is_always_written_in_training_and_writers_are_flushed_at_the_end(tmp_path):
    make_trainer(tmp_path, config=make_config(save_summary_steps=2)).train(batches(5), steps=5)
    assert written(tmp_path, "loss") == [2, 4, 5]
    assert ModeKeys.TRAIN == "train"
