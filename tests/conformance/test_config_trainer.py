"""Rows CFG-01 .. CFG-16 of the conformance list that need a Trainer; test_config.py has the others."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models import VERBS, input_fn, make_config, make_optimizer, make_trainer, model_fn, run
from tpuspec import RunConfig, TPUConfig, Trainer
from tpuspec.errors import ConfigError
from tpuspec.tracer.topology import count_replicas

both_paths = pytest.mark.parametrize("use_tpu", [True, False], ids=["xla", "native"])
every_verb = pytest.mark.parametrize("verb", VERBS)


def without_features(labels, mode, params):
    raise AssertionError("no legal model_fn")


PER_CORE_WITH_MODEL_PARALLELISM = RunConfig(
    tpu_config=TPUConfig(per_host_input_for_training=False, num_cores_per_replica=2))

# CFG-01: name, what breaks the rule, the error; in the order of the checks.
FAULTS = [
    ("config", {"config": None}, ValueError, "^`config` must be provided"),
    ("reserved-key", {"params": {"batch_size": 8}}, ValueError, "are reserved keys"),
    ("no-train-batch-size", {"train_batch_size": None}, ValueError, "`train_batch_size` cannot be `None`"),
    ("train-batch-size-type", {"train_batch_size": 1.0}, TypeError, "^train_batch_size must be int"),
    ("train-batch-size-sign", {"train_batch_size": 0}, ValueError, "^train_batch_size must be positive"),
    ("per-core-input", {"config": PER_CORE_WITH_MODEL_PARALLELISM}, ValueError,
     "^Model parallelism only supports per host input for training"),
    ("eval-batch-size-type", {"eval_batch_size": 1.0}, TypeError, "^eval_batch_size must be int"),
    ("eval-batch-size-sign", {"eval_batch_size": 0}, ValueError, "^eval_batch_size must be positive"),
    ("predict-batch-size-type", {"predict_batch_size": 1.0}, TypeError, "^predict_batch_size must be int"),
    ("predict-batch-size-sign", {"predict_batch_size": 0}, ValueError, "^predict_batch_size must be positive"),
    ("model-fn", {"model_fn": without_features}, ValueError, "must include features argument"),
]


def build(**arguments):
    return Trainer(**{"model_fn": model_fn, "config": make_config(model_dir="unused"), "train_batch_size": 2,
                      **arguments})


@pytest.mark.parametrize(("first", "second"), [
    pytest.param(first, second, id=f"{first[0]}-before-{second[0]}")
    for first, second in itertools.combinations(FAULTS, 2) if not first[1].keys() & second[1].keys()])
def test_cfg_01_the_earlier_of_two_broken_rules_is_the_one_reported(first, second):
    with pytest.raises(first[2], match=first[3]):
        build(**second[1], **first[1])


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault[0])
def test_cfg_01_each_rule_alone_is_checked_by_the_constructor(fault):
    with pytest.raises(fault[2], match=fault[3]):
        build(**fault[1])


@pytest.mark.parametrize("config", [None, {"model_dir": "unused"}, TPUConfig()], ids=["None", "dict", "TPUConfig"])
@both_paths
def test_cfg_01_config_must_be_a_run_config(config, use_tpu):
    match = rf"^`config` must be provided with type `RunConfig`; got {type(config).__name__}"
    with pytest.raises(ValueError, match=match):
        build(config=config, use_tpu=use_tpu)


@pytest.mark.parametrize("keys", [["batch_size"], ["context"], ["batch_size", "context"]], ids="-".join)
@both_paths
def test_cfg_01_batch_size_and_context_are_reserved_in_params(keys, use_tpu):
    with pytest.raises(ValueError, match=r"^\['" + "', '".join(keys) + r"'\] are reserved keys in params"):
        build(params=dict.fromkeys(keys, 1), use_tpu=use_tpu)


@both_paths
def test_cfg_01_use_tpu_is_not_reserved_in_params(use_tpu):
    assert build(params={"use_tpu": "mine"}, use_tpu=use_tpu).params == {"use_tpu": "mine"}


def test_cfg_01_a_single_replica_of_several_cores_may_have_per_host_input():
    config = make_config(model_dir="unused", tpu_config=TPUConfig(num_cores_per_replica=2))
    assert build(config=config).config == config


# CFG-02

SIZES = ["train_batch_size", "eval_batch_size", "predict_batch_size"]


def test_cfg_02_xla_needs_a_train_batch_size_even_to_predict_only():
    with pytest.raises(ValueError, match=r"^`train_batch_size` cannot be `None`"):
        build(train_batch_size=None, predict_batch_size=8)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [1.0, "8", np.float32(8)], ids=repr)
def test_cfg_02_a_batch_size_that_is_no_int_is_a_type_error(name, value):
    with pytest.raises(TypeError, match=f"^{name} must be int; got"):
        build(**{name: value})


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -1, np.int64(-8)], ids=repr)
def test_cfg_02_a_batch_size_that_is_not_positive_is_a_value_error(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be positive; got {value}"):
        build(**{name: value})


@pytest.mark.parametrize("make_int", [int, np.int32, np.int64])
def test_cfg_02_numpy_ints_are_batch_sizes(tmp_path, make_int):
    trainer = make_trainer(tmp_path, **{name: make_int(2) for name in SIZES})
    assert trainer.train(input_fn, steps=1).global_step() == 1
    assert trainer.evaluate(input_fn)["global_step"] == 1
    assert len(list(trainer.predict(input_fn))) == 4


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [None, 1.0, 0, -1])
def test_cfg_02_without_xla_no_batch_size_is_checked_by_the_constructor(name, value):
    build(**{"train_batch_size": None, name: value}, use_tpu=False)


def two_batches(params):
    return [(torch.ones(2, 1), torch.zeros(2, 1))] * 2


@every_verb
def test_cfg_02_without_xla_a_missing_batch_size_is_absent_from_params(tmp_path, verb):
    seen = []

    def notes_params(params):
        seen.append(params)
        return two_batches(params)

    run(make_trainer(tmp_path, use_tpu=False, **dict.fromkeys(SIZES)), verb, notes_params)
    assert seen == [{}]


# CFG-03

def test_cfg_03_no_eval_batch_size_is_an_error_of_evaluate_only(tmp_path):
    trainer = make_trainer(tmp_path, eval_batch_size=None)
    trainer.train(input_fn, steps=1)
    with pytest.raises(ValueError, match=r"^eval_batch_size in TPUEstimator constructor cannot be `None`"):
        trainer.evaluate(input_fn, steps=1)


def test_cfg_03_no_predict_batch_size_is_an_error_of_the_first_prediction_only(tmp_path):
    trainer = make_trainer(tmp_path, predict_batch_size=None)
    trainer.train(input_fn, steps=1)
    trainer.evaluate(input_fn)
    predictions = trainer.predict(input_fn)
    with pytest.raises(ValueError, match=r"^predict_batch_size in TPUEstimator constructor cannot be `None`"):
        next(predictions)


def test_cfg_03_evaluation_off_the_accelerator_needs_no_eval_batch_size(tmp_path):
    trainer = make_trainer(tmp_path, eval_batch_size=None, eval_on_tpu=False)
    assert trainer.evaluate(two_batches)["loss"] > 0


# CFG-06

@every_verb
def test_cfg_06_num_shards_other_than_the_replicas_found_is_an_error_of_the_first_use(tmp_path, verb):
    trainer = make_trainer(
        tmp_path, config=make_config(tpu_config=TPUConfig(num_shards=16)), train_batch_size=16, eval_batch_size=16,
        predict_batch_size=16)
    assert trainer.latest_checkpoint() is None
    assert trainer.global_step() == 0
    match = r"TPUConfig\.num_shards is not set correctly, it should be \(1\), got \(16\)"
    with pytest.raises(ValueError, match=match):
        run(trainer, verb)


def test_cfg_06_predict_compares_num_shards_at_its_first_item(tmp_path):
    predictions = make_trainer(
        tmp_path, config=make_config(tpu_config=TPUConfig(num_shards=16))).predict(input_fn)
    with pytest.raises(ValueError, match="num_shards is not set correctly"):
        next(predictions)


def test_cfg_06_cores_of_a_replica_count_against_num_shards():
    config = TPUConfig(num_shards=2, num_cores_per_replica=2)
    with pytest.raises(ValueError, match=r"num_shards is not set correctly, it should be \(1\), got \(2\)"):
        count_replicas(config, num_devices=2, num_devices_per_host=2)
    assert count_replicas(config, num_devices=4, num_devices_per_host=4) == 2


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_cfg_06_none_takes_the_replicas_that_are_found(num_devices):
    assert count_replicas(TPUConfig(), num_devices=num_devices, num_devices_per_host=num_devices) == num_devices


def test_cfg_06_without_xla_num_shards_is_not_compared(tmp_path):
    trainer = make_trainer(tmp_path, use_tpu=False, config=make_config(tpu_config=TPUConfig(num_shards=16)))
    assert trainer.train(input_fn, steps=1).global_step() == 1


# CFG-07

@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_cfg_07_one_shard_uses_exactly_one_device(num_devices):
    config = TPUConfig(num_shards=1)
    assert count_replicas(config, num_devices=num_devices, num_devices_per_host=num_devices) == 1


def test_cfg_07_one_shard_of_several_cores_is_compared_as_any_other_number():
    config = TPUConfig(num_shards=1, num_cores_per_replica=2)
    with pytest.raises(ValueError, match=r"it should be \(4\), got \(1\)"):
        count_replicas(config, num_devices=8, num_devices_per_host=8)


@pytest.mark.parametrize("eval_on_tpu", [True, False])
def test_cfg_07_with_one_shard_eval_on_tpu_still_says_where_to_evaluate(tmp_path, eval_on_tpu):
    seen = []

    def notes_params(features, labels, mode, params, model, optimizer):
        seen.append((mode, params["use_tpu"], features.device.type))
        return model_fn(features, labels, mode, params, model, optimizer)

    trainer = make_trainer(tmp_path, notes_params, config=make_config(tpu_config=TPUConfig(num_shards=1)),
                           eval_on_tpu=eval_on_tpu)
    trainer.train(input_fn, steps=1).evaluate(input_fn)
    assert set(seen) == {("train", True, "xla"), ("eval", eval_on_tpu, "xla" if eval_on_tpu else "cpu")}


# CFG-13

def test_cfg_13_a_model_dir_given_twice_must_be_the_same(tmp_path):
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    match = r"^`model_dir` are set both in constructor and `RunConfig`, but with different values: .*one.*other"
    with pytest.raises(ValueError, match=match):
        make_trainer(one, config=make_config(model_dir=other))


@pytest.mark.parametrize("make_path", [str, Path])
def test_cfg_13_the_same_model_dir_twice_is_accepted(tmp_path, make_path):
    trainer = make_trainer(make_path(tmp_path), config=make_config(model_dir=str(tmp_path)))
    assert trainer.model_dir == trainer.config.model_dir == str(tmp_path)


@pytest.mark.parametrize("make_path", [str, Path])
@pytest.mark.parametrize("in_config", [True, False])
def test_cfg_13_a_model_dir_given_once_is_that_of_trainer_and_config(tmp_path, in_config, make_path):
    path = make_path(tmp_path)
    trainer = make_trainer(None, config=make_config(model_dir=path)) if in_config else make_trainer(path)
    assert trainer.model_dir == trainer.config.model_dir == str(tmp_path)


@pytest.mark.parametrize("model_dir", [None, ""])
def test_cfg_13_without_a_model_dir_a_temporary_folder_is_taken(tmp_path, monkeypatch, model_dir):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    trainers = [make_trainer(model_dir), make_trainer(model_dir)]
    assert trainers[0].model_dir != trainers[1].model_dir
    for trainer in trainers:
        assert trainer.model_dir == trainer.config.model_dir
        assert Path(trainer.model_dir).parent == tmp_path
        assert Path(trainer.model_dir).is_dir()


def test_cfg_13_the_folder_of_the_trainer_is_not_written_into_the_callers_config(tmp_path):
    config = make_config()
    make_trainer(tmp_path, config=config)
    assert config.model_dir is None


# CFG-14

def test_cfg_14_an_evaluator_is_not_chief_and_does_not_train(tmp_path):
    trainer = make_trainer(tmp_path, config=make_config(task_type="evaluator"))
    assert not trainer.config.is_chief
    with pytest.raises(ValueError, match=r"task_type='evaluator'.*train_and_evaluate") as caught:
        trainer.train(input_fn, steps=1)
    assert isinstance(caught.value, ConfigError)
    assert trainer.latest_checkpoint() is None


def test_cfg_14_an_evaluator_evaluates_what_the_chief_has_trained(tmp_path):
    chief = make_trainer(tmp_path, config=make_config(task_type="worker"))
    assert chief.config.is_chief
    chief.train(input_fn, steps=3)
    evaluator = make_trainer(tmp_path, config=make_config(task_type="evaluator"))
    result = evaluator.evaluate(input_fn)
    assert result == chief.evaluate(input_fn)
    assert result["global_step"] == 3
    assert len(list(evaluator.predict(input_fn))) == 4


# CFG-16

def test_cfg_16_params_and_config_are_deep_copies(tmp_path):
    trainer = make_trainer(tmp_path, params={"layers": [8, 8]})
    trainer.params["layers"].append(4)
    trainer.params["width"] = 1
    trainer.config.tpu_config.iterations_per_loop = 100
    trainer.config.seed = 99
    assert trainer.params == {"layers": [8, 8]}
    assert trainer.config.tpu_config.iterations_per_loop == 2
    assert trainer.config.seed == 1


def test_cfg_16_what_the_caller_changes_after_construction_has_no_effect(tmp_path):
    params, config = {"layers": [8, 8]}, make_config()
    trainer = make_trainer(tmp_path, params=params, config=config)
    params["layers"].append(4)
    params["width"] = 1
    config.tpu_config.iterations_per_loop = 100
    config.seed = 99
    assert trainer.params == {"layers": [8, 8]}
    assert trainer.config.tpu_config.iterations_per_loop == 2
    assert trainer.config.seed == 1


def test_cfg_16_model_and_optimizer_functions_get_the_params_of_construction(tmp_path):
    params, seen = {"layers": [8, 8]}, []

    def notes_model(params):
        seen.append(params)
        return torch.nn.Linear(1, 1)

    def notes_optimizer(model, params):
        seen.append(params)
        return make_optimizer(model, params)

    trainer = make_trainer(tmp_path, params=params, model=notes_model, optimizer=notes_optimizer)
    params["layers"].append(4)
    trainer.train(input_fn, steps=1)
    assert seen == [{"layers": [8, 8]}] * 2


@both_paths
@pytest.mark.parametrize(("every", "num_lines"), [(None, 0), (2, 3)])
def test_cfg_16_log_step_count_steps_none_is_legal_and_logs_no_progress(tmp_path, capsys, use_tpu, every, num_lines):
    config = make_config(log_step_count_steps=every, show_progress=True)
    make_trainer(tmp_path, use_tpu=use_tpu, config=config).train(input_fn, steps=6)
    lines = [line for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert len(lines) == num_lines
