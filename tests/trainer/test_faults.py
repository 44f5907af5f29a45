"""What must end in a clear error, and what an error must leave behind."""

from __future__ import annotations

import itertools
import os
import signal
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tpuspec
from tests.regression import (
    make_trainer,
    regression_fn,
    regression_rows,
    rows_input,
)
from tpuspec import TPUEstimatorSpec
from tpuspec.errors import CheckpointError, ConfigError, HostCallError

pytestmark = pytest.mark.usefixtures("signals_as_in_a_terminal")


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


def test_training_while_a_prediction_is_open_is_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    generator = trainer.predict(rows_input())
    next(generator)
    with pytest.raises(ConfigError, match="predict\\(\\) generator is open.*close"):
        trainer.train(rows_input(), max_steps=2)
    generator.close()
    trainer.train(rows_input(), max_steps=2)


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


@pytest.mark.parametrize("use_tpu", [True, False])
def test_gradients_of_an_update_that_was_not_completed_are_dropped(use_tpu, tmp_path):
    x, y = regression_rows(4).tensors

    def train(folder, *calls):
        trainer = make_trainer(tmp_path / folder, use_tpu=use_tpu, params={"accumulate": 3})
        for num_batches in calls:
            trainer.train(lambda params, n=num_batches: [(x, y)] * n, steps=1)
        return trainer.get_variable_value("weight")

    np.testing.assert_array_equal(train("broken", 2, 3), train("whole", 3))


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


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    make_trainer(tmp_path).train(rows_input(), max_steps=2)
    other = make_trainer(tmp_path, optimizer=lambda module, params: torch.optim.AdamW(module.parameters()))
    with pytest.raises(CheckpointError, match="optimizer is AdamW, the checkpoint's is SGD"):
        other.train(rows_input(), max_steps=4)


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
    seen, runs = [], []

    def model_fn(features, labels, mode, params, model, optimizer, global_step):
        spec = regression_fn(features, labels, mode, params, model, optimizer, global_step)

        def train_op():
            spec.loss.backward()
            tpuspec.CrossShardOptimizer(optimizer).step()
            runs.append(True)
            if len(runs) == 3:
                raise RuntimeError("broke")
            optimizer.zero_grad()

        return spec.replace(train_op=train_op, host_call=(lambda step: seen.append(int(step)), [global_step]))

    trainer = make_trainer(tmp_path, model_fn)
    with pytest.raises(RuntimeError, match="broke"):
        trainer.train(rows_input(), max_steps=6)
    trainer.train(rows_input(), max_steps=6)
    assert seen == list(range(6))


def failing_in_predict(step):
    calls = []

    def host_call(y):
        calls.append(len(y))
        if len(calls) == step:
            raise ValueError("in host_call")

    def model_fn(features, mode, params, model):
        return TPUEstimatorSpec(mode, predictions={"y": model(features)}, host_call=(host_call, [model(features)]))

    return model_fn


@pytest.mark.parametrize("queue_size", [1, 8])
def test_an_error_of_host_call_in_predict_comes_behind_the_rows_before_it(queue_size, tmp_path):
    trainer = make_trainer(tmp_path, failing_in_predict(3), host_queue_size=queue_size)
    rows = []
    with pytest.raises(HostCallError, match="host_call raised ValueError at step 3"):
        for row in trainer.predict(lambda params: [torch.ones(4, 1)] * 20):
            rows.append(row)
    assert len(rows) == 8


def test_an_error_of_the_input_in_predict_comes_behind_the_rows_before_it(tmp_path):
    def input_fn(params):
        yield from [torch.ones(4, 1)] * 3
        raise OSError("disk gone")

    rows = []
    with pytest.raises(OSError, match="disk gone"):
        for row in make_trainer(tmp_path, failing_in_predict(99)).predict(input_fn):
            rows.append(row)
    assert len(rows) == 12


@pytest.mark.parametrize(("config", "message"), [
    ({"seed": -1}, "seed must be integer, 0 .. 2"),
    ({"seed": 2**64}, "seed must be integer, 0 .. 2"),
    ({"model_dir": "nosuch://bucket/run"}, "'nosuch://bucket/run' is no address of a file system that can be opened"),
    ({"model_dir": "gs://bucket/run"}, "'gs://bucket/run' needs a package that is not installed: .*gcsfs"),
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
def test_fault_22_23_a_signal_ends_training_after_a_save_of_the_last_finished_step(number, exception, tmp_path, capsys):
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


def test_fault_24_a_second_signal_ends_training_at_once(tmp_path):
    calls, second = [], []

    class Interrupt(tpuspec.SessionRunHook):
        def after_run(self, context):
            if context.step == 4:
                os.kill(os.getpid(), signal.SIGINT)
                calls.append("first")
                second.append(time.monotonic())
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
                calls.append("not at once")

    trainer = make_trainer(tmp_path, save_checkpoints_steps=100)
    with pytest.raises(KeyboardInterrupt, match="^$"):
        trainer.train(rows_input(), hooks=[Interrupt()], max_steps=100)
    assert time.monotonic() - second[0] < 10
    assert calls == ["first"]
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-0"], "nothing more was saved"


def test_fault_23_a_signal_breaks_off_a_wait_for_the_input_and_the_last_step_is_saved(tmp_path):
    def input_fn(params):
        for i in itertools.count():
            if i == 3:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)
            yield regression_rows(4).tensors

    trainer = make_trainer(tmp_path, allow_inexact_resume=True)
    with pytest.raises(KeyboardInterrupt) as caught:  # noqa: PT011 - its notes are matched
        trainer.train(input_fn, max_steps=100)
    (note,) = caught.value.__notes__
    assert "stopped at step 3, newest checkpoint" in note
    assert trainer.latest_checkpoint() == str(tmp_path / "checkpoint-3")


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
