"""Rows CFG-04 .. CFG-14 of the conformance list that TPUConfig and RunConfig settle alone, without a Trainer."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import pytest

from tpuspec.cluster import read_cluster
from tpuspec.config import (
    InputPipelineConfig,
    LoopLength,
    RunConfig,
    TPUConfig,
    parse_iterations_per_loop,
)
from tpuspec.errors import ConfigError


@contextlib.contextmanager
def raises_value_error(match: str) -> Iterator[None]:
    """Expects tpuspec's ConfigError, which is a ValueError, and not a TypeError."""
    with pytest.raises(ValueError, match=match) as caught:
        yield
    assert isinstance(caught.value, ConfigError)
    assert not isinstance(caught.value, TypeError)


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.parametrize(("value", "length", "unit"), [
    (1, 1, "count"), ("1", 1, "count"), (123, 123, "count"), ("123", 123, "count"),
    ("300s", 300, "seconds"), ("1m", 60, "seconds"), ("10h", 36000, "seconds"), ("1000m", 60000, "seconds")])
def test_cfg_04_iterations_per_loop_is_a_count_or_a_time_and_the_config_keeps_it_as_given(value, length, unit):
    config = TPUConfig(iterations_per_loop=value)
    assert config.iterations_per_loop == value
    assert type(config.iterations_per_loop) is type(value)
    assert config.loop_length == LoopLength(value=length, unit=unit)
    assert parse_iterations_per_loop(value) == LoopLength(value=length, unit=unit)


@pytest.mark.parametrize("value", [
    0, -1, "0", "01", "001", "012", "0h", "0m", "0s", "-1", "-1h", "-0h", "01h",
    2.5, True, None, "1d", "1H", "5|", "", "s", " 5", "5\n", "1.5h", "1h30m"])
def test_cfg_05_any_other_iterations_per_loop_is_a_value_error_when_the_config_is_built(value):
    with raises_value_error("iterations_per_loop: Value must be positive integer value or time-based value"):
        TPUConfig(iterations_per_loop=value)
    with raises_value_error("Value must be positive integer value or time-based value"):
        parse_iterations_per_loop(value)


@pytest.mark.parametrize("value", [0, -1, 2.0, "2", True])
def test_cfg_06_num_shards_that_is_no_positive_int_is_a_value_error(value):
    with raises_value_error("num_shards must be positive"):
        TPUConfig(num_shards=value)


@pytest.mark.parametrize("value", [None, 1, 16])
def test_cfg_06_num_shards_is_not_compared_with_the_devices_when_the_config_is_built(value):
    assert TPUConfig(num_shards=value).num_shards == value


@pytest.mark.parametrize("value", [7, 0, -1, 3, 256])
def test_cfg_08_num_cores_per_replica_outside_the_known_set_is_a_value_error(value):
    with raises_value_error(rf"num_cores_per_replica must be 1, 2, 4, .*; got {value}"):
        TPUConfig(num_cores_per_replica=value)


@pytest.mark.parametrize("value", [None, 1, 2, 4, 8, 16, 32, 64, 128])
def test_cfg_08_num_cores_per_replica_within_the_known_set_is_kept(value):
    assert TPUConfig(num_cores_per_replica=value).num_cores_per_replica == value


@pytest.mark.parametrize("value", [
    InputPipelineConfig.PER_SHARD_V1, InputPipelineConfig.PER_HOST_V2, InputPipelineConfig.BROADCAST, True, None])
def test_cfg_08_eval_input_other_than_per_host_v1_or_sliced_is_a_value_error(value):
    with raises_value_error("eval_training_input_configuration must be PER_HOST_V1 or SLICED"):
        TPUConfig(eval_training_input_configuration=value)


@pytest.mark.parametrize("value", [InputPipelineConfig.PER_HOST_V1, InputPipelineConfig.SLICED])
def test_cfg_08_eval_input_per_host_v1_or_sliced_is_kept(value):
    assert TPUConfig(eval_training_input_configuration=value).eval_training_input_configuration is value


@pytest.mark.parametrize("value", [0, -1, 1.5, "3", True])
def test_cfg_08_initial_infeed_sleep_secs_that_is_no_positive_int_is_a_value_error(value):
    with raises_value_error("initial_infeed_sleep_secs must be a positive int"):
        TPUConfig(initial_infeed_sleep_secs=value)


TPU_CONFIG_FAULTS = [
    ("iterations_per_loop", 0, "iterations_per_loop"),
    ("num_shards", 0, "num_shards must be positive"),
    ("input_partition_dims", [], "input_partition_dims must be a list with one or two elements"),
    ("num_cores_per_replica", 7, "num_cores_per_replica must be"),
    ("eval_training_input_configuration", InputPipelineConfig.BROADCAST, "eval_training_input_configuration must be"),
    ("initial_infeed_sleep_secs", 0, "initial_infeed_sleep_secs must be"),
]


@pytest.mark.parametrize(("first", "second"), [
    pytest.param(*pair, id=f"{pair[0][0]}-before-{pair[1][0]}")
    for pair in itertools.combinations(TPU_CONFIG_FAULTS, 2)])
def test_cfg_08_the_earlier_of_two_broken_rules_is_the_one_reported(first, second):
    with raises_value_error(f"^(TPUConfig.)?{first[2]}"):
        TPUConfig(**{second[0]: second[1], first[0]: first[1]})
    with raises_value_error(f"^(TPUConfig.)?{second[2]}"):
        TPUConfig(**{second[0]: second[1]})


def test_cfg_09_tpu_config_defaults():
    config = TPUConfig()
    assert config.iterations_per_loop == 2
    assert config.num_shards is None
    assert config.num_cores_per_replica is None
    assert config.per_host_input_for_training is InputPipelineConfig.PER_HOST_V1
    assert config.eval_training_input_configuration is InputPipelineConfig.PER_HOST_V1
    assert config.input_partition_dims is None
    assert config.initial_infeed_sleep_secs is None
    assert config.host_call_every_n_steps == 1


@pytest.mark.parametrize(("value", "deployment"), [
    (True, InputPipelineConfig.PER_HOST_V1), (False, InputPipelineConfig.PER_SHARD_V1),
    (InputPipelineConfig.PER_HOST_V2, InputPipelineConfig.PER_HOST_V2),
    (InputPipelineConfig.BROADCAST, InputPipelineConfig.BROADCAST)])
def test_cfg_09_per_host_input_for_training_may_be_a_bool(value, deployment):
    assert TPUConfig(per_host_input_for_training=value).per_host_input_for_training is deployment


def test_cfg_09_deployments_have_the_known_numbers():
    assert {member.name: member.value for member in InputPipelineConfig} == {
        "PER_SHARD_V1": 1, "PER_HOST_V1": 2, "PER_HOST_V2": 3, "BROADCAST": 4, "SLICED": 5}


RUN_CONFIG_DEFAULTS = {
    "model_dir": None, "seed": None, "save_summary_steps": 100, "save_checkpoints_secs": 600,
    "save_checkpoints_steps": None, "keep_checkpoint_max": 5, "keep_checkpoint_every_n_hours": 10000,
    "log_step_count_steps": 100}


def test_cfg_10_run_config_defaults():
    config = RunConfig()
    assert {name: getattr(config, name) for name in RUN_CONFIG_DEFAULTS} == RUN_CONFIG_DEFAULTS


@pytest.mark.parametrize("name", RUN_CONFIG_DEFAULTS)
def test_cfg_10_an_explicit_none_is_accepted_in_the_constructor_and_in_replace(name):
    assert getattr(RunConfig(**{name: None}), name) is None
    assert getattr(RunConfig().replace(**{name: None}), name) is None


INVALID_RUN_CONFIG = [
    ("model_dir", "", "model_dir should be non-empty"),
    ("save_summary_steps", -1, "save_summary_steps should be >= 0"),
    ("save_checkpoints_steps", -1, "save_checkpoints_steps should be >= 0"),
    ("save_checkpoints_secs", -1, "save_checkpoints_secs should be >= 0"),
    ("keep_checkpoint_max", -1, "keep_checkpoint_max should be >= 0"),
    ("keep_checkpoint_every_n_hours", 0, "keep_checkpoint_every_n_hours should be > 0"),
    ("keep_checkpoint_every_n_hours", -2, "keep_checkpoint_every_n_hours should be > 0"),
    ("log_step_count_steps", -1, "log_step_count_steps should be >= 0"),
    ("seed", 1.0, "seed must be integer"),
    ("seed", "1", "seed must be integer"),
    ("save_summary_steps", "5", "save_summary_steps should be >= 0"),
    ("save_checkpoints_secs", "10m", "save_checkpoints_secs should be >= 0"),
    ("keep_checkpoint_max", [5], "keep_checkpoint_max should be >= 0"),
]


@pytest.mark.parametrize(("name", "value", "match"), INVALID_RUN_CONFIG)
def test_cfg_11_an_invalid_value_is_a_value_error_in_the_constructor_and_in_replace(name, value, match):
    with raises_value_error(match):
        RunConfig(**{name: value})
    with raises_value_error(match):
        RunConfig().replace(**{name: value})


@pytest.mark.parametrize("name", [
    "save_summary_steps", "save_checkpoints_steps", "save_checkpoints_secs", "keep_checkpoint_max"])
def test_cfg_11_zero_is_within_the_limit_of_the_distances_and_counts(name):
    assert getattr(RunConfig(**{name: 0}), name) == 0


def test_cfg_12_both_checkpoint_distances_are_refused_in_the_constructor_and_in_replace():
    with raises_value_error("cannot be both set"):
        RunConfig(save_checkpoints_steps=10, save_checkpoints_secs=20)
    with raises_value_error("cannot be both set"):
        RunConfig().replace(save_checkpoints_steps=10, save_checkpoints_secs=20)


@pytest.mark.parametrize(("given", "steps", "secs"), [
    ({"save_checkpoints_steps": 10}, 10, None),
    ({"save_checkpoints_secs": 20}, None, 20),
    ({"save_checkpoints_steps": 10, "save_checkpoints_secs": None}, 10, None),
    ({"save_checkpoints_steps": None, "save_checkpoints_secs": 20}, None, 20),
    ({"save_checkpoints_steps": None, "save_checkpoints_secs": None}, None, None)])
def test_cfg_12_one_checkpoint_distance_or_none_at_all_may_be_set(given, steps, secs):
    config = RunConfig(**given)
    assert (config.save_checkpoints_steps, config.save_checkpoints_secs) == (steps, secs)


@pytest.mark.parametrize(("before", "changes", "steps", "secs"), [
    ({}, {"save_checkpoints_steps": 100}, 100, None),
    ({"save_checkpoints_steps": 10}, {"save_checkpoints_secs": 50}, None, 50),
    ({}, {"save_checkpoints_secs": 50}, None, 50),
    ({}, {"save_checkpoints_secs": None}, None, None),
    ({"save_checkpoints_steps": 10}, {"save_checkpoints_steps": None}, None, None),
    ({}, {"save_checkpoints_steps": None, "save_checkpoints_secs": None}, None, None),
    ({"save_checkpoints_steps": 10}, {"seed": 1}, 10, None),
    ({}, {"seed": 1}, None, 600)])
def test_cfg_12_replacing_one_checkpoint_distance_clears_the_other(before, changes, steps, secs):
    config = RunConfig(**before).replace(**changes)
    assert (config.save_checkpoints_steps, config.save_checkpoints_secs) == (steps, secs)


def test_cfg_12_replace_returns_a_deep_copy():
    config = RunConfig(model_dir="runs", tpu_config=TPUConfig(num_shards=2))
    copy = config.replace(seed=3)
    assert (copy.model_dir, copy.seed, config.seed) == ("runs", 3, None)
    copy.tpu_config.num_shards = 8
    assert config.tpu_config.num_shards == 2


@pytest.mark.parametrize("name", ["master", "no_such_field", "is_chief"])
def test_cfg_12_replacing_an_unknown_name_is_a_value_error(name):
    with raises_value_error(f"Replacing {name} is not supported"):
        RunConfig().replace(**{name: "x"})


def test_cfg_12_tpu_config_can_be_replaced():
    assert RunConfig().replace(tpu_config=TPUConfig(num_shards=4)).tpu_config.num_shards == 4


def test_cfg_14_a_process_alone_is_the_chief_worker():
    config = RunConfig()
    assert config.is_chief
    cluster = config.cluster
    assert (cluster.task_type, cluster.task_index, cluster.num_workers) == ("worker", 0, 1)


@pytest.mark.parametrize("task_type", ["chief", "ps", "master", "", None, 0])
def test_cfg_14_another_task_type_is_a_value_error(task_type):
    with raises_value_error("task_type must be 'worker' or 'evaluator'"):
        RunConfig(task_type=task_type)
    with raises_value_error("task_type must be 'worker' or 'evaluator'"):
        RunConfig().replace(task_type=task_type)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_cfg_14_of_several_processes_exactly_rank_0_is_chief(monkeypatch, world):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    chiefs = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        config = RunConfig()
        assert (config.cluster.task_index, config.cluster.num_workers) == (rank, world)
        chiefs.append(config.is_chief)
    assert chiefs == [True] + [False] * (world - 1)


@pytest.mark.parametrize(("rank", "world"), [("0", None), (None, "2")])
def test_cfg_14_rank_without_world_size_or_the_reverse_is_a_value_error(monkeypatch, rank, world):
    for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
        if value is not None:
            monkeypatch.setenv(name, value)
    with raises_value_error("RANK and WORLD_SIZE must be set both or neither"):
        RunConfig()


@pytest.mark.parametrize(("rank", "world"), [
    ("2", "2"), ("5", "2"), ("-1", "2"), ("0", "0"), ("", "2"), ("one", "2"), ("0", "two"), ("0.5", "2")])
def test_cfg_14_a_rank_out_of_range_is_a_value_error(monkeypatch, rank, world):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with raises_value_error(rf"RANK must be a number in 0 \.\. WORLD_SIZE - 1; got RANK='{rank}'"):
        read_cluster("worker")


@pytest.mark.parametrize(("rank", "world"), [(None, None), ("0", "2")])
def test_cfg_14_an_evaluator_stands_outside_the_cluster(monkeypatch, rank, world):
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
    config = RunConfig(task_type="evaluator")
    assert not config.is_chief
    assert (config.cluster.task_type, config.cluster.num_workers) == ("evaluator", 0)
