"""The Trainer as its users see it, on XLA:CPU and, where it matters, on plain PyTorch."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score
from torch import nn
from torch.utils.data import TensorDataset

import tpuspec
from tpuspec import ModeKeys, TPUEstimatorSpec
from tpuspec.errors import CheckpointError, ConfigError, HostCallError


def regression_rows(num_rows: int) -> TensorDataset:
    x = torch.linspace(-1, 1, num_rows).reshape(-1, 1)
    return TensorDataset(x, 3 * x + 1)


def regression_fn(features, labels, mode, params, model, optimizer, global_step):
    prediction = model(features)
    if mode == ModeKeys.PREDICT:
        return TPUEstimatorSpec(mode, predictions={"y": prediction, "x": features})
    losses = F.mse_loss(prediction, labels, reduction="none").squeeze(1)
    if mode == ModeKeys.EVAL:
        return TPUEstimatorSpec(mode, loss=losses, eval_metrics=(
            lambda labels, prediction: {"mean_error": (labels - prediction).abs().squeeze(1)}, [labels, prediction]))
    loss = losses.mean()
    host_call = params.get("host_call")
    train_op = tpuspec.CrossShardOptimizer(optimizer).minimize(loss, accumulate_steps=params.get("accumulate", 1))
    return TPUEstimatorSpec(mode, loss=loss, train_op=train_op,
                            host_call=host_call and (host_call, [global_step, loss.reshape(1)]))


def sgd(module, params):
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def make_trainer(model_dir, model_fn=regression_fn, *, batch_size=4, use_tpu=True, iterations_per_loop=2, params=None,
                 model=lambda params: nn.Linear(1, 1), optimizer=sgd, **config):
    config = {"seed": 3, "show_progress": False} | config
    eval_on_tpu = config.pop("eval_on_tpu", True)
    return tpuspec.Trainer(
        model_fn, model=model, optimizer=optimizer, model_dir=model_dir, params=params, use_tpu=use_tpu,
        train_batch_size=batch_size, eval_batch_size=batch_size, predict_batch_size=batch_size, eval_on_tpu=eval_on_tpu,
        config=tpuspec.RunConfig(tpu_config=tpuspec.TPUConfig(iterations_per_loop=iterations_per_loop), **config))


def rows_input(num_rows=16):
    return lambda params: regression_rows(num_rows)


def num_compiles() -> int:
    import torch_xla.debug.metrics as xla_metrics

    data = xla_metrics.metric_data("CompileTime")
    return 0 if data is None else data[0]


def scalars(folder: Path) -> dict[str, list[int]]:
    steps: dict[str, list[int]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        steps.setdefault(entry["name"], []).append(entry["step"])
    return steps


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


@pytest.mark.parametrize("use_tpu", [True, False])
def test_host_call_error_names_host_call_and_step(use_tpu, tmp_path):
    seen = []

    def host_call(global_step, loss):
        seen.append(int(global_step[0]))
        if len(seen) == 7:
            raise ZeroDivisionError("by the user")

    trainer = make_trainer(tmp_path, params={"host_call": host_call}, use_tpu=use_tpu)
    with pytest.raises(HostCallError, match=r"host_call raised ZeroDivisionError at step 7 .*by the user") as caught:
        trainer.train(rows_input(), max_steps=20)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert seen == list(range(7)), "no call is made behind the one that raised"


def test_host_call_error_of_the_last_step_is_not_lost(tmp_path):
    def host_call(global_step, loss):
        if int(global_step[0]) == 3:
            raise ValueError("at the end")

    trainer = make_trainer(tmp_path, params={"host_call": host_call})
    with pytest.raises(HostCallError, match="step 4"):
        trainer.train(rows_input(), max_steps=4)


@pytest.mark.parametrize("use_tpu", [True, False])
def test_input_error_ends_training_with_that_very_exception(use_tpu, tmp_path):
    error, called = OSError("disk gone"), []

    def input_fn(params):
        x, y = regression_rows(4).tensors
        for _ in range(3):
            yield x, y
        raise error

    trainer = make_trainer(tmp_path, use_tpu=use_tpu, params={"host_call": lambda step, loss: called.append(int(step))})
    with pytest.raises(OSError, match="disk gone") as caught:
        trainer.train(input_fn, max_steps=10)
    assert caught.value is error
    assert called == [0, 1, 2], "the host calls of completed steps are made"


def test_training_goes_on_from_the_checkpoint_in_a_new_trainer(tmp_path):
    assert make_trainer(tmp_path).train(rows_input(), steps=5).global_step() == 5
    later = make_trainer(tmp_path)
    later.train(rows_input(), steps=5)
    assert later.global_step() == 10
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-0", "checkpoint-10", "checkpoint-5"]
    assert later.latest_checkpoint() == str(tmp_path / "checkpoint-10")
    assert later.get_variable_names() == ["bias", "global_step", "weight"]
    assert later.get_variable_value("global_step") == 10


def test_resumed_optimizer_state_is_that_of_an_uninterrupted_run(tmp_path):
    x, y = regression_rows(4).tensors

    def same_batch(params):
        return [(x, y)] * 6

    whole = make_trainer(tmp_path / "whole").train(same_batch, max_steps=6)
    make_trainer(tmp_path / "parts").train(same_batch, max_steps=3)
    parts = make_trainer(tmp_path / "parts").train(same_batch, max_steps=6)
    for name in ("weight", "bias"):
        np.testing.assert_array_equal(whole.get_variable_value(name), parts.get_variable_value(name))


def test_checkpoints_are_saved_at_start_at_their_distance_and_at_the_end(tmp_path):
    saves = []

    class Listener(tpuspec.CheckpointSaverListener):
        def after_save(self, global_step):
            saves.append(global_step)

    make_trainer(tmp_path, save_checkpoints_steps=10).train(
        rows_input(), max_steps=26, saving_listeners=[Listener()])
    assert saves == [0, 10, 20, 26]


def test_listener_that_returns_true_stops_training(tmp_path):
    class Listener(tpuspec.CheckpointSaverListener):
        def after_save(self, global_step):
            return global_step == 4

    trainer = make_trainer(tmp_path, save_checkpoints_steps=4)
    trainer.train(rows_input(), max_steps=20, saving_listeners=[Listener()])
    assert trainer.global_step() == 4


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


def test_a_module_passed_in_holds_the_trained_weights(tmp_path):
    module = nn.Linear(1, 1)
    before = module.weight.detach().clone()
    trainer = make_trainer(tmp_path, model=module)
    trainer.train(rows_input(), max_steps=4)
    after = module.weight.detach().cpu()
    assert not torch.equal(before, after)
    np.testing.assert_array_equal(after.numpy(), trainer.get_variable_value("weight"))


def test_plain_pytorch_and_xla_agree(tmp_path):
    values = {}
    for use_tpu in (False, True):  # plain first: torch's backward threads are then made without XLA devices
        trainer = make_trainer(tmp_path / str(use_tpu), use_tpu=use_tpu)
        trainer.train(rows_input(), max_steps=10)
        result = trainer.evaluate(rows_input(11))
        predictions = np.stack([row["y"] for row in trainer.predict(rows_input(11))])
        values[use_tpu] = (result["loss"], result["mean_error"], predictions)
    np.testing.assert_allclose(values[True][0], values[False][0], rtol=1e-5)
    np.testing.assert_allclose(values[True][1], values[False][1], rtol=1e-5)
    np.testing.assert_allclose(values[True][2], values[False][2], rtol=1e-5)


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


def test_predictions_keep_the_order_and_show_no_padding(tmp_path):
    trainer = make_trainer(tmp_path)
    rows = list(trainer.predict(rows_input(10)))
    np.testing.assert_array_equal([row["x"] for row in rows], regression_rows(10).tensors[0].numpy())
    batches = list(trainer.predict(rows_input(10), yield_single_examples=False, predict_keys=["y", "unknown"]))
    assert [list(batch) for batch in batches] == [["y"]] * 3
    assert [len(batch["y"]) for batch in batches] == [4, 4, 2]


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


def test_training_while_a_prediction_is_open_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    generator = trainer.predict(rows_input())
    next(generator)
    with pytest.raises(ConfigError, match="predict\\(\\) generator is open.*close"):
        trainer.train(rows_input(), max_steps=2)
    generator.close()
    trainer.train(rows_input(), max_steps=2)


def test_input_that_ends_early_saves_and_ends_cleanly(tmp_path):
    trainer = make_trainer(tmp_path)
    x, y = regression_rows(4).tensors
    trainer.train(lambda params: [(x, y)] * 5, max_steps=100)
    assert trainer.global_step() == 5
    assert trainer.latest_checkpoint() == str(tmp_path / "checkpoint-5")


def test_accumulated_gradients_equal_one_larger_batch(tmp_path):
    steps = []
    x, y = regression_rows(8).tensors
    halves = [(x[:4], y[:4]), (x[4:], y[4:])] * 3
    accumulated = make_trainer(tmp_path / "a", params={
        "accumulate": 2, "host_call": lambda step, loss: steps.append((step.tolist(), len(loss)))})
    accumulated.train(lambda params: halves, max_steps=3)
    whole = make_trainer(tmp_path / "b", batch_size=8)
    whole.train(lambda params: [(x, y)] * 3, max_steps=3)

    assert accumulated.global_step() == whole.global_step() == 3
    assert steps == [([0, 0], 2), ([1, 1], 2), ([2, 2], 2)], "one call per update, with the rows of both batches"
    for name in ("weight", "bias"):
        np.testing.assert_allclose(accumulated.get_variable_value(name), whole.get_variable_value(name), atol=1e-6)


def test_a_callable_drives_several_optimizers(tmp_path):
    def optimizers(module, params):
        return {"a": torch.optim.SGD(module[0].parameters(), lr=0.1), "b": torch.optim.Adam(module[1].parameters())}

    def model_fn(features, labels, mode, params, model, optimizer):
        loss = F.mse_loss(model(features), labels)

        def train_op():
            loss.backward()
            for one in optimizer.values():
                tpuspec.CrossShardOptimizer(one).step()
                one.zero_grad()

        return TPUEstimatorSpec(mode, loss=loss, train_op=train_op)

    trainer = make_trainer(tmp_path, model_fn, model=lambda p: nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1)),
                           optimizer=optimizers)
    trainer.train(rows_input(), max_steps=2)
    first = {name: trainer.get_variable_value(name) for name in trainer.get_variable_names()}
    resumed = make_trainer(tmp_path, model_fn, model=lambda p: nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1)),
                           optimizer=optimizers)
    resumed.train(rows_input(), max_steps=4)
    for name in ("0.weight", "1.weight"):
        assert not np.array_equal(first[name], resumed.get_variable_value(name))


def test_scaffold_is_made_once_and_its_parts_are_used(tmp_path):
    made = []

    def scaffold_fn():
        made.append("made")
        return tpuspec.Scaffold(init_fn=lambda module: nn.init.constant_(module.weight, 42.0),
                                ready_fn=lambda module: made.append("ready"))

    def model_fn(features, labels, mode, params, model, optimizer):
        spec = regression_fn(features, labels, mode, params, model, optimizer, torch.zeros(1))
        if mode == ModeKeys.TRAIN:
            spec = spec.replace(train_op=lambda: None)
        return spec.replace(scaffold_fn=scaffold_fn)

    for use_tpu in (True, False):
        made.clear()
        trainer = make_trainer(tmp_path / str(use_tpu), model_fn, use_tpu=use_tpu)
        trainer.train(rows_input(), max_steps=4)
        assert trainer.get_variable_value("weight") == 42.0
        trainer.evaluate(rows_input())
        list(trainer.predict(rows_input()))
        assert made == ["made", "ready"] * 3


def test_hooks_fire_at_loop_boundaries_and_can_stop(tmp_path):
    events = []

    class Hook(tpuspec.SessionRunHook):
        def begin(self, context):
            events.append("begin")

        def before_run(self, context):
            events.append(("before", context.step))

        def after_run(self, context):
            events.append(("after", context.step))
            if context.step == 8:
                context.request_stop()

        def end(self, context):
            events.append("end")

    trainer = make_trainer(tmp_path, iterations_per_loop=4)
    trainer.train(rows_input(), hooks=[Hook()], max_steps=100)
    assert events == ["begin", ("before", 0), ("after", 4), ("before", 4), ("after", 8), "end"]
    assert trainer.global_step() == 8


def test_loops_can_fill_a_time(tmp_path):
    boundaries = []

    class Hook(tpuspec.SessionRunHook):
        def after_run(self, context):
            boundaries.append(context.step)

    make_trainer(tmp_path, iterations_per_loop="1s").train(rows_input(), hooks=[Hook()], max_steps=30)
    assert boundaries[0] == 1, "nothing is known of a step's time before the first"
    assert boundaries[-1] == 30


def test_summaries_of_training_and_evaluation(tmp_path):
    trainer = make_trainer(tmp_path, save_summary_steps=5, log_step_count_steps=10)
    trainer.train(rows_input(), max_steps=22)
    trainer.evaluate(rows_input(), name="held out")
    assert scalars(tmp_path) == {
        "loss": [5, 10, 15, 20, 22], "global_step/sec": [10, 20, 22], "examples/sec": [10, 20, 22]}
    assert scalars(tmp_path / "eval_held out") == {"mean_error": [22], "loss": [22], "checkpoint_path": [22]}


def test_summary_functions_work_inside_host_call(tmp_path):
    def host_call(global_step, loss):
        tpuspec.summary.scalar("mine", loss[0])
        tpuspec.summary.text("note", "hello", step=int(global_step[0]))

    for use_tpu in (True, False):
        trainer = make_trainer(tmp_path / str(use_tpu), params={"host_call": host_call}, use_tpu=use_tpu)
        trainer.train(rows_input(), max_steps=3)
        written = scalars(tmp_path / str(use_tpu))
        assert written["mine"] == [1, 2, 3]
        assert written["note"] == [0, 1, 2]


def test_tied_weights_stay_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    def model_fn(features, mode, params, model, optimizer):
        loss = model(features).square().mean()
        return TPUEstimatorSpec(mode, loss=loss, train_op=optimizer)

    trainer = make_trainer(tmp_path, model_fn, model=lambda params: Tied())
    trainer.train(lambda params: [torch.ones(4, 3)] * 6, max_steps=6)
    module = trainer._sessions[True].module
    assert module.a.weight is module.b.weight
    np.testing.assert_array_equal(trainer.get_variable_value("a.weight"), trainer.get_variable_value("b.weight"))


def test_another_model_than_the_checkpoints_is_refused(tmp_path):
    make_trainer(tmp_path).train(rows_input(), max_steps=2)
    other = make_trainer(tmp_path, model=lambda params: nn.Linear(1, 1, bias=False))
    with pytest.raises(CheckpointError, match=r"Restoring from checkpoint failed.*mismatch(?s:.*)bias"):
        other.train(rows_input(), max_steps=4)


def test_optimizer_made_in_model_fn_is_refused(tmp_path):
    def model_fn(features, labels, mode, params, model):
        loss = F.mse_loss(model(features), labels)
        return TPUEstimatorSpec(mode, loss=loss, train_op=torch.optim.SGD(model.parameters(), lr=0.1))

    with pytest.raises(tpuspec.errors.SpecError, match="not one that the Trainer made.*optimizer=function"):
        make_trainer(tmp_path, model_fn).train(rows_input(), max_steps=2)


def test_a_trainer_without_progress_prints_nothing(tmp_path, capsys):
    trainer = make_trainer(tmp_path)
    trainer.train(rows_input(), max_steps=2)
    trainer.evaluate(rows_input())
    assert capsys.readouterr().out == ""


def test_banner_progress_and_table_are_plain_lines_without_a_terminal(tmp_path, capsys):
    trainer = make_trainer(tmp_path, show_progress=True, log_step_count_steps=2)
    trainer.train(rows_input(), max_steps=4)
    trainer.evaluate(rows_input())
    trainer.train(rows_input(), max_steps=4)
    out = capsys.readouterr().out
    assert out.count("devices") == 1 and "1 x CPU" in out
    assert "step 2/4" in out and "step 4/4" in out and "traced" in out
    assert "mean_error" in out and "training is complete: global step 4 of 4" in out
    assert "\x1b" not in out


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


@pytest.mark.slow
def test_plain_pytorch_before_xla_in_one_process():
    code = """
import tempfile, torch, tpuspec
from tests.test_trainer import make_trainer, rows_input
for use_tpu in (False, True):
    make_trainer(tempfile.mkdtemp(), use_tpu=use_tpu).train(rows_input(), max_steps=2)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240,
                          cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr


def batch_norm_net(params):
    return nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))


def test_one_graph_serves_all_training_steps_of_a_model_with_buffers(tmp_path):
    counts = []

    class Count(tpuspec.SessionRunHook):
        def begin(self, context):
            counts.append(num_compiles())

        def after_run(self, context):
            counts.append(num_compiles())

    # Without momentum: an optimizer that makes its state in the first step has a second graph, in plain torch_xla too.
    trainer = make_trainer(tmp_path, model=batch_norm_net, iterations_per_loop=1,
                           optimizer=lambda module, params: torch.optim.SGD(module.parameters(), lr=0.1))
    trainer.train(rows_input(), hooks=[Count()], max_steps=4)
    before, *after = counts
    assert after == [before + 1] * 4
    counts.clear()
    trainer.train(rows_input(), hooks=[Count()], max_steps=6)
    assert len(set(counts)) == 1, "a second training needs no other graph"


@pytest.mark.parametrize("use_tpu", [True, False])
def test_gradients_of_an_update_that_was_not_completed_are_dropped(use_tpu, tmp_path):
    x, y = regression_rows(4).tensors

    def train(folder, *calls):
        trainer = make_trainer(tmp_path / folder, use_tpu=use_tpu, params={"accumulate": 3})
        for num_batches in calls:
            trainer.train(lambda params, n=num_batches: [(x, y)] * n, steps=1)
        return trainer.get_variable_value("weight")

    np.testing.assert_array_equal(train("broken", 2, 3), train("whole", 3))


def test_a_training_in_parts_reads_the_dataset_on(tmp_path):
    seen = {}

    def model_fn(features, labels, mode, params, model, optimizer):
        spec = regression_fn(features, labels, mode, params, model, optimizer, torch.zeros(1))
        name = params["name"]
        return spec.replace(host_call=(lambda x: seen.setdefault(name, []).append(x.squeeze(1).tolist()), [features]))

    whole = make_trainer(tmp_path / "whole", model_fn, params={"name": "whole"})
    whole.train(rows_input(18), steps=9)
    for steps in (3, 1, 5):
        make_trainer(tmp_path / "parts", model_fn, params={"name": "parts"}).train(rows_input(18), steps=steps)
    assert seen["parts"] == seen["whole"]
    assert seen["whole"][:4] != seen["whole"][4:8], "each epoch has its own order"


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


def test_a_scaffolds_saver_and_restore_work_on_weights_in_memory_and_a_failed_restore_leaves_no_trace(tmp_path):
    fails = []

    def restore(module, tensors):
        with torch.no_grad():
            module.weight.zero_()
        if fails:
            raise RuntimeError("restore broke")
        module.load_state_dict({name.removeprefix("saved."): tensor for name, tensor in tensors.items()})

    def scaffold_fn():
        return tpuspec.Scaffold(
            saver=lambda module: {f"saved.{name}": tensor for name, tensor in module.state_dict().items()},
            restore=restore)

    def model_fn(features, labels, mode, params, model, optimizer, global_step):
        return regression_fn(features, labels, mode, params, model, optimizer, global_step).replace(
            scaffold_fn=scaffold_fn)

    trainer = make_trainer(tmp_path, model_fn)
    trainer.train(rows_input(), max_steps=4)
    in_memory = trainer.evaluate(rows_input())
    assert make_trainer(tmp_path, model_fn).evaluate(rows_input()) == in_memory
    weight = trainer._sessions[True].module.weight.detach().cpu()
    fails.append(True)
    with pytest.raises(RuntimeError, match="restore broke"):
        trainer.evaluate(rows_input())
    assert torch.equal(trainer._sessions[True].module.weight.detach().cpu(), weight)


def test_hyper_parameters_of_a_resumed_run_are_those_it_asks_for_and_a_difference_is_told(tmp_path, caplog):
    def with_lr(lr):
        return make_trainer(tmp_path, optimizer=lambda module, params: torch.optim.SGD(
            module.parameters(), lr=lr, momentum=0.9))

    with_lr(0.1).train(rows_input(), max_steps=2)
    before = with_lr(0.1).get_variable_value("weight")
    with_lr(0.0).train(rows_input(), max_steps=4)
    np.testing.assert_array_equal(with_lr(0.0).get_variable_value("weight"), before)
    assert "lr is 0.0 as this run asks; the checkpoint had 0.1" in caplog.text


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    make_trainer(tmp_path).train(rows_input(), max_steps=2)
    other = make_trainer(tmp_path, optimizer=lambda module, params: torch.optim.AdamW(module.parameters()))
    with pytest.raises(CheckpointError, match="optimizer is AdamW, the checkpoint's is SGD"):
        other.train(rows_input(), max_steps=4)


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


def test_a_prediction_left_open_by_a_hook_ends_training_with_an_error(tmp_path):
    open_generators = []
    trainer = make_trainer(tmp_path)

    class Predict(tpuspec.SessionRunHook):
        def after_run(self, context):
            generator = trainer.predict(rows_input())
            next(generator)
            open_generators.append(generator)

    with pytest.raises(ConfigError, match=r"train\(\) cannot go on while a predict\(\) generator is open"):
        trainer.train(rows_input(), hooks=[Predict()], max_steps=8)
    open_generators[0].close()


def test_training_within_training_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)

    class Train(tpuspec.SessionRunHook):
        def after_run(self, context):
            trainer.train(rows_input(), steps=1)

    with pytest.raises(ConfigError, match="called by a hook or listener of train"):
        trainer.train(rows_input(), hooks=[Train()], max_steps=8)


def test_a_step_that_fails_leaves_host_and_device_at_the_same_step(tmp_path):
    fails = [True]
    seen = []

    def model_fn(features, labels, mode, params, model, optimizer, global_step):
        spec = regression_fn(features, labels, mode, params, model, optimizer, global_step)

        def train_op():
            spec.loss.backward()
            tpuspec.CrossShardOptimizer(optimizer).step()
            if len(seen) == 2 and fails:
                raise RuntimeError("broke")
            optimizer.zero_grad()

        return spec.replace(train_op=train_op, host_call=(lambda step: seen.append(int(step)), [global_step]))

    trainer = make_trainer(tmp_path, model_fn)
    with pytest.raises(RuntimeError, match="broke"):
        trainer.train(rows_input(), max_steps=6)
    fails.clear()
    trainer.train(rows_input(), max_steps=6)
    assert seen == list(range(6))


def test_an_error_of_host_call_is_not_lost_when_a_prediction_is_closed_early(tmp_path):
    def model_fn(features, mode, params, model):
        def host_call(y):
            raise ValueError("in host_call")

        return TPUEstimatorSpec(mode, predictions={"y": model(features)}, host_call=(host_call, [model(features)]))

    generator = make_trainer(tmp_path, model_fn).predict(lambda params: [torch.ones(4, 1)] * 3)
    next(generator)
    with pytest.raises(HostCallError, match="host_call raised ValueError at step 1"):
        generator.close()


@pytest.mark.parametrize(("config", "message"), [
    ({"seed": -1}, "seed must be integer, 0 .. 2"),
    ({"seed": 2**64}, "seed must be integer, 0 .. 2"),
    ({"model_dir": "gs://bucket/run"}, "model_dir must be a local folder in this version; got 'gs://bucket/run'"),
])
def test_settings_that_could_not_work_are_refused_at_once(config, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(config.pop("model_dir", None), **config)


def test_a_float_max_steps_is_refused_though_training_is_complete(tmp_path):
    trainer = make_trainer(tmp_path).train(rows_input(), max_steps=2)
    with pytest.raises(TypeError, match="Train max_steps must be int; got 2.0"):
        trainer.train(rows_input(), max_steps=2.0)


def test_a_lazy_module_is_refused_with_the_mend(tmp_path):
    trainer = make_trainer(tmp_path, model=lambda params: nn.LazyLinear(1))
    with pytest.raises(ConfigError, match="weight of the model has no shape yet. Run one batch"):
        trainer.train(rows_input(), max_steps=2)


@pytest.mark.parametrize(("number", "exception"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_ends_training_after_a_save_of_the_last_finished_step(number, exception, tmp_path, capsys):
    def host_call(global_step, loss):
        if int(global_step[0]) == 5:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    trainer = make_trainer(tmp_path, params={"host_call": host_call}, iterations_per_loop=1000, show_progress=True)
    with pytest.raises(exception) as caught:
        trainer.train(rows_input(), max_steps=1_000_000)
    assert exception is KeyboardInterrupt or caught.value.code == 143
    step = trainer.global_step()
    assert 6 <= step < 1000
    assert trainer.latest_checkpoint() == str(tmp_path / f"checkpoint-{step}")
    assert f"stopped at step {step}" in capsys.readouterr().out
    assert signal.getsignal(number) is before


def test_a_second_signal_ends_training_at_once(tmp_path):
    calls = []

    def input_fn(params):
        for i in itertools.count():
            if i == 3:
                os.kill(os.getpid(), signal.SIGINT)
                calls.append("first")
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
                calls.append("not at once")
            yield regression_rows(4).tensors

    trainer = make_trainer(tmp_path)
    with pytest.raises(KeyboardInterrupt, match="^$"):
        trainer.train(input_fn, max_steps=100)
    assert calls == ["first"]


def test_a_short_run_reports_its_last_step_too(tmp_path, capsys):
    make_trainer(tmp_path, show_progress=True).train(rows_input(), max_steps=5)
    assert "step 5/5" in capsys.readouterr().out
    assert scalars(tmp_path) == {"loss": [5], "global_step/sec": [5], "examples/sec": [5]}


@pytest.mark.parametrize(("arguments", "message"), [
    ({"optimizer": torch.optim.SGD([torch.zeros(1)], lr=0.1)}, r"optimizer must be a function of \(model, params\)"),
    ({"model": 5}, "model must be a function of params, or a torch.nn.Module; got int"),
    ({"model": None}, "optimizer needs a model"),
])
def test_factories_of_the_wrong_kind_are_refused_at_construction(arguments, message, tmp_path):
    with pytest.raises((TypeError, ValueError), match=message):
        make_trainer(tmp_path, **arguments)


@pytest.mark.parametrize("size", [1.5, -4])
def test_a_batch_size_that_could_not_work_is_refused_without_xla_too(size, tmp_path):
    trainer = make_trainer(tmp_path, batch_size=size, use_tpu=False)
    with pytest.raises((TypeError, ValueError), match=f"the batch size of mode 'train' must be .*; got {size}"):
        trainer.train(rows_input(), max_steps=2)


def test_float64_input_is_warned_of(tmp_path, caplog):
    make_trainer(tmp_path, lambda features, mode, params, model: TPUEstimatorSpec(
        mode, loss=model(features.float()).squeeze(1))).evaluate(lambda params: [np.zeros((4, 1))])
    assert "input_fn yields float64" in caplog.text
