"""Rows TRAIN-01 .. TRAIN-07 of the conformance list: steps, loop boundaries, and the order of train()'s checks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.models import StepRecorder, input_fn, make_config, make_spec, make_trainer
from tpuspec import EstimatorSpec, Scaffold, SessionRunHook, TPUConfig
from tpuspec.errors import TpuspecError

both_paths = pytest.mark.parametrize("use_tpu", [True, False], ids=["xla", "native"])


def loop_trainer(model_dir, iterations_per_loop, **arguments):
    return make_trainer(
        model_dir, config=make_config(tpu_config=TPUConfig(iterations_per_loop=iterations_per_loop)), **arguments)


def boundaries(trainer, start, **length):
    """Returns the steps at which the host regained control, in a train() after one of `start` steps."""
    if start:
        trainer.train(input_fn, steps=start)
    recorder = StepRecorder()
    assert trainer.train(input_fn, hooks=[recorder], **length) is trainer
    return recorder.after


@pytest.mark.parametrize(("loop", "steps", "start", "expected"), [
    (4, 10, 0, [4, 8, 10]), (4, 10, 3, [7, 11, 13]),
    (4, 12, 0, [4, 8, 12]), (4, 12, 3, [7, 11, 15]),
    (40, 12, 0, [12]), (40, 12, 3, [15])])
def test_train_01_steps_are_incremental_and_the_last_loop_is_shortened(tmp_path, loop, steps, start, expected):
    trainer = loop_trainer(tmp_path, loop)
    assert boundaries(trainer, start, steps=steps) == expected
    assert trainer.global_step() == start + steps
    assert trainer.get_variable_value("global_step") == start + steps


def test_train_01_steps_are_counted_from_the_checkpoint_by_a_new_trainer_too(tmp_path):
    loop_trainer(tmp_path, 4).train(input_fn, steps=3)
    assert boundaries(loop_trainer(tmp_path, 4), 0, steps=10) == [7, 11, 13]


def test_train_01_the_updates_are_those_of_the_steps_and_no_more(tmp_path):
    trainer = make_trainer(tmp_path, model=torch.nn.Linear(1, 1, bias=False))
    trainer.train(input_fn, steps=1)
    weight = trainer.get_variable_value("weight").item()
    trainer.train(input_fn, steps=2)
    # loss w² at features of ones, labels of zeros: each update at rate 0.1 multiplies w by 0.8
    assert trainer.get_variable_value("weight").item() == pytest.approx(weight * 0.8**2)


@pytest.mark.parametrize(("loop", "max_steps", "start", "expected"), [
    (4, 10, 0, [4, 8, 10]), (4, 10, 3, [7, 10]),
    (4, 12, 0, [4, 8, 12]), (4, 15, 3, [7, 11, 15]),
    (40, 12, 0, [12]), (40, 12, 3, [12])])
def test_train_02_max_steps_is_absolute(tmp_path, loop, max_steps, start, expected):
    trainer = loop_trainer(tmp_path, loop)
    assert boundaries(trainer, start, max_steps=max_steps) == expected
    assert trainer.global_step() == max_steps


def test_train_02_max_steps_counts_from_the_checkpoint_of_another_trainer(tmp_path):
    loop_trainer(tmp_path, 4).train(input_fn, steps=3)
    assert boundaries(loop_trainer(tmp_path, 4), 0, max_steps=10) == [7, 10]


def test_train_03_hooks_fire_once_per_loop_and_see_the_step_after_it(tmp_path):
    recorder = StepRecorder()
    loop_trainer(tmp_path, 4).train(input_fn, hooks=[recorder], steps=10)
    assert recorder.before == [0, 4, 8]
    assert recorder.after == [4, 8, 10]


def test_train_03_the_model_in_after_run_has_the_updates_of_the_loop(tmp_path):
    weights = []

    class ReadWeight(SessionRunHook):
        def begin(self, context):
            weights.append(context.model.weight.item())

        def after_run(self, context):
            weights.append(context.model.weight.item())

    trainer = loop_trainer(tmp_path, 4, model=torch.nn.Linear(1, 1, bias=False))
    trainer.train(input_fn, hooks=[ReadWeight()], steps=6)
    assert weights[1:] == pytest.approx([weights[0] * 0.8**4, weights[0] * 0.8**6])


def test_train_03_without_xla_hooks_fire_per_step(tmp_path):
    recorder = StepRecorder()
    loop_trainer(tmp_path, 4, use_tpu=False).train(input_fn, hooks=[recorder], steps=10)
    assert recorder.before == list(range(10))
    assert recorder.after == list(range(1, 11))


@both_paths
@pytest.mark.parametrize("value", [12.3, 12.0])
@pytest.mark.parametrize("name", ["steps", "max_steps"])
def test_train_04_a_float_number_of_steps_is_a_type_error(tmp_path, use_tpu, name, value):
    with pytest.raises(TypeError, match=rf"^Train {name} must be int; got {value}"):
        make_trainer(tmp_path, use_tpu=use_tpu).train(input_fn, **{name: value})


@both_paths
@pytest.mark.parametrize("value", [0, -1, -1.5, 0.0])
@pytest.mark.parametrize("name", ["steps", "max_steps"])
def test_train_04_a_number_of_steps_that_is_not_positive_is_a_value_error_before_its_type_counts(
        tmp_path, use_tpu, name, value):
    with pytest.raises(ValueError, match=rf"^Must specify {name} > 0, given: {value}") as caught:
        make_trainer(tmp_path, use_tpu=use_tpu).train(input_fn, **{name: value})
    assert not isinstance(caught.value, TypeError)


@both_paths
@pytest.mark.parametrize("make_int", [np.int32, np.int64])
def test_train_04_numpy_ints_are_numbers_of_steps(tmp_path, use_tpu, make_int):
    trainer = make_trainer(tmp_path, use_tpu=use_tpu)
    assert trainer.train(input_fn, steps=make_int(2)).global_step() == 2
    assert trainer.train(input_fn, max_steps=make_int(3)).global_step() == 3
    assert make_trainer(tmp_path, use_tpu=use_tpu).train(input_fn, max_steps=3).global_step() == 3


class Listener:
    """No CheckpointSaverListener."""


def input_without_params():
    return input_fn({})


def one_batch_input(params):
    return torch.ones(2, 1), torch.zeros(2, 1)


def wrong_rows_input(params):
    return [(torch.ones(1, 1), torch.zeros(1, 1))] * 2


def case_model_fn(case):
    """A model_fn as broken as `case` says: its arguments (`takes`), then what it returns (`body`)."""
    def full(features, labels, mode, params, model, optimizer):
        if case.body == "raises":
            raise LookupError("model_fn itself")
        spec = make_spec(mode, model(features), labels, optimizer)
        if case.body == "chief hooks":
            return EstimatorSpec(mode, loss=spec.loss, train_op=spec.train_op, training_chief_hooks=[SessionRunHook()])
        changes: dict[str, Any] = {"scaffold_fn": Scaffold}
        if case.body.startswith("scaffold"):
            changes["scaffold_fn"] = lambda: None
        if case.body.endswith("scalar"):
            changes["host_call"] = (lambda loss: None, [spec.loss])
        return spec.replace(**changes)

    if case.takes == "features":
        return lambda features, mode, model, optimizer: full(features, None, mode, {}, model, optimizer)
    if case.takes == "labels":
        return lambda features, labels, mode, model, optimizer: full(features, labels, mode, {}, model, optimizer)
    return full


def run_case(model_dir, case):
    trainer = make_trainer(
        model_dir, case_model_fn(case), params=None,
        config=make_config(task_type=case.task_type, tpu_config=TPUConfig(num_shards=case.num_shards)))
    return trainer.train(case.input_fn, hooks=case.hooks, steps=case.steps, max_steps=case.max_steps,
                         saving_listeners=case.listeners)


# What is wrong with everything at first, then the error that is met, and what mends it, in the order of the checks.
CHECKS = [
    ("task_type='evaluator'", {"task_type": "worker"}),
    ("Can not provide both steps and max_steps", {"max_steps": None}),
    ("Must specify steps > 0, given: 0", {"steps": None, "max_steps": -2}),
    ("Must specify max_steps > 0, given: -2", {"max_steps": None}),
    ("Hooks must be a SessionRunHook", {"hooks": None}),
    ("num_shards is not set correctly", {"num_shards": None}),
    ("one of `steps` or `max_steps` must be set", {"steps": 1.5}),
    ("Train steps must be int", {"steps": 1}),
    ("must be a list of CheckpointSaverListener", {"listeners": None}),
    ("does not include params argument, required by TPUEstimator.*params\\[\"batch_size\"\\]", {
        "input_fn": one_batch_input}),
    ("got one batch", {"input_fn": wrong_rows_input}),
    ("every training batch must have", {"input_fn": input_fn}),
    ("model_fn .* does not take labels", {"takes": "labels"}),
    ("model_fn .* does not include params argument", {"takes": "everything"}),
    ("model_fn itself", {"body": "chief hooks"}),
    ("training_chief_hooks", {"body": "scaffold"}),
    ("scaffold_fn returns None", {"body": "scalar"}),
    ("got scalar", {"body": "right"}),
]


def test_train_05_with_everything_broken_mending_in_order_meets_the_errors_in_order(tmp_path):
    case = SimpleNamespace(
        task_type="evaluator", steps=0, max_steps=0, hooks=[Listener()], num_shards=16, listeners=[Listener()],
        input_fn=input_without_params, takes="features", body="raises")
    for match, mend in CHECKS:
        with pytest.raises((TpuspecError, LookupError), match=match):
            run_case(tmp_path, case)
        vars(case).update(mend)
    assert run_case(tmp_path, case).global_step() == 1


def test_train_05_scaffold_fn_is_called_before_host_call_tensors_are_checked(tmp_path):
    case = SimpleNamespace(task_type="worker", steps=1, max_steps=None, hooks=None, num_shards=None, listeners=None,
                           input_fn=input_fn, takes="everything", body="scaffold and scalar")
    with pytest.raises(ValueError, match="scaffold_fn returns None"):
        run_case(tmp_path, case)


def test_train_05_max_steps_that_is_reached_returns_before_hooks_are_checked(tmp_path):
    trainer = make_trainer(tmp_path).train(input_fn, steps=1)
    assert trainer.train(input_fn, hooks=[Listener()], max_steps=1) is trainer
    with pytest.raises(TypeError, match="Hooks must be a SessionRunHook"):
        trainer.train(input_fn, hooks=[Listener()], max_steps=2)


def test_train_06_xla_needs_steps_or_max_steps(tmp_path):
    with pytest.raises(ValueError, match=r"^For TPU training, one of `steps` or `max_steps` must be set\."):
        make_trainer(tmp_path).train(input_fn)


def test_train_06_without_xla_training_goes_on_to_the_end_of_the_input(tmp_path):
    def two_batches(params):
        return [(torch.ones(2, 1), torch.zeros(2, 1))] * 2

    trainer = make_trainer(tmp_path, use_tpu=False)
    assert trainer.train(two_batches) is trainer
    assert trainer.global_step() == 2
    assert trainer.get_variable_value("global_step") == 2


@pytest.mark.parametrize("anew", [False, True], ids=["same-trainer", "new-trainer"])
@both_paths
def test_train_07_training_that_is_complete_returns_at_once(tmp_path, use_tpu, anew):
    trainer = make_trainer(tmp_path, use_tpu=use_tpu).train(input_fn, max_steps=5)
    assert trainer.global_step() == 5
    checkpoint = trainer.latest_checkpoint()

    def never(**arguments):
        raise AssertionError("called though training is complete")

    if anew:  # with settings that would be refused were they looked at
        trainer = make_trainer(
            tmp_path, lambda features, params: never(), use_tpu=use_tpu, model=never, optimizer=never,
            config=make_config(tpu_config=TPUConfig(num_shards=16)), train_batch_size=127)
    assert trainer.train(never, hooks=[Listener()], max_steps=5, saving_listeners=[Listener()]) is trainer
    assert trainer.train(never, max_steps=3) is trainer
    assert trainer.global_step() == 5
    assert trainer.latest_checkpoint() == checkpoint


def test_train_07_steps_go_on_where_max_steps_ended(tmp_path):
    trainer = make_trainer(tmp_path).train(input_fn, max_steps=5)
    assert trainer.train(input_fn, steps=1).global_step() == 6
