"""Training as users see it, on XLA:CPU and, where it matters, on plain PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import tpuspec
from tests.regression import (
    batch_norm_net,
    make_trainer,
    num_compiles,
    regression_rows,
    rows_input,
)
from tpuspec import TPUEstimatorSpec
from tpuspec.errors import InputError


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


@pytest.mark.slow
def test_plain_pytorch_before_xla_in_one_process():
    code = """
import tempfile, torch, tpuspec
from tests.regression import make_trainer, rows_input
for use_tpu in (False, True):
    make_trainer(tempfile.mkdtemp(), use_tpu=use_tpu).train(rows_input(), max_steps=2)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240,
                          cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


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


def batches_of(num_rows):
    return lambda params: DataLoader(regression_rows(num_rows), batch_size=params["batch_size"])


@pytest.mark.parametrize("arguments", [{"max_steps": 3}, {"steps": 100}])
def test_a_short_last_batch_that_training_would_draw_is_told_before_the_first_step(tmp_path, arguments):
    trainer = make_trainer(tmp_path)
    with pytest.raises(InputError, match=r"must have params\['batch_size'\] rows, and batch 3 of the input.*drop_last"):
        trainer.train(batches_of(9), **arguments)
    assert trainer.global_step() == 0
    trainer.train(batches_of(9), max_steps=2)
    assert trainer.global_step() == 2


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("show_progress", [True, False])
def test_an_input_that_ends_early_is_told_at_the_start_and_at_the_end(tmp_path, capsys, caplog, show_progress,
                                                                      accumulate):
    trainer = make_trainer(tmp_path, params={"accumulate": accumulate}, show_progress=show_progress)
    trainer.train(batches_of(16), max_steps=7)
    steps = 4 // accumulate
    assert trainer.global_step() == steps
    told = capsys.readouterr().out if show_progress else caplog.text
    assert "training will end by step 4 of 7" in told and f"the input ended at step {steps} of 7" in told


def test_an_input_that_ends_with_the_training_needs_no_word(tmp_path, caplog):
    make_trainer(tmp_path).train(batches_of(16), max_steps=4)
    assert not caplog.records
