"""RunConfig and TPUConfig as structured configs, and the messages of their own rules."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, ValidationError

from tpuspec.config import CaptureMode, InputPipelineConfig, LoopLength, RunConfig, TPUConfig, validate
from tpuspec.errors import ConfigError, TpuspecError


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def build(schema: type, *overrides: str):
    """What the command line does: the schema, overridden by `name=value`, made an object."""
    config = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_dotlist(list(overrides)))
    return OmegaConf.to_object(config)


@pytest.mark.parametrize("schema", [RunConfig, TPUConfig])
def test_a_schema_without_overrides_makes_the_default_config(schema):
    made = build(schema)
    assert type(made) is schema
    assert made == schema()


def test_a_config_survives_the_way_through_omegaconf():
    config = RunConfig(
        model_dir="runs/a", seed=3, save_summary_steps=None, save_checkpoints_steps=50, keep_checkpoint_max=None,
        keep_checkpoint_every_n_hours=0.5, log_step_count_steps=None, capture=CaptureMode.require, host_queue_size=2,
        show_progress=False, task_type="evaluator",
        tpu_config=TPUConfig(
            iterations_per_loop="10m", num_shards=4, num_cores_per_replica=2,
            per_host_input_for_training=InputPipelineConfig.PER_HOST_V2, input_partition_dims=[[1, 2], None],
            eval_training_input_configuration=InputPipelineConfig.SLICED, initial_infeed_sleep_secs=1,
            host_call_every_n_steps=5))
    assert OmegaConf.to_object(OmegaConf.structured(config)) == config


@pytest.mark.parametrize("capture", CaptureMode)
def test_a_config_survives_being_written_as_yaml(capture):
    config = RunConfig(save_checkpoints_secs=0.5, capture=capture,
                       tpu_config=TPUConfig(iterations_per_loop="2h", per_host_input_for_training=False))
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    assert OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.create(text))) == config


def test_overriding_save_checkpoints_steps_clears_the_default_seconds():
    config = build(RunConfig, "save_checkpoints_steps=40")
    assert (config.save_checkpoints_steps, config.save_checkpoints_secs) == (40, None)


@pytest.mark.parametrize(("override", "secs"), [
    ("save_checkpoints_secs=30", 30), ("save_checkpoints_secs=0.5", 0.5), ("save_checkpoints_secs=null", None)])
def test_overriding_save_checkpoints_secs(override, secs):
    config = build(RunConfig, override)
    assert (config.save_checkpoints_steps, config.save_checkpoints_secs) == (None, secs)


def test_overriding_both_checkpoint_distances_is_refused():
    with pytest.raises(ConfigError, match="cannot be both set; got 40 and 30"):
        build(RunConfig, "save_checkpoints_steps=40", "save_checkpoints_secs=30")


@pytest.mark.parametrize(("override", "length"), [
    ("iterations_per_loop=30s", LoopLength(value=30, unit="seconds")),
    ("iterations_per_loop=2h", LoopLength(value=7200, unit="seconds")),
    ("iterations_per_loop=50", LoopLength(value=50, unit="count"))])
def test_iterations_per_loop_may_be_overridden_by_a_count_or_a_time(override, length):
    assert build(TPUConfig, override).loop_length == length


@pytest.mark.parametrize("name", ["PER_SHARD_V1", "PER_HOST_V1", "PER_HOST_V2", "BROADCAST"])
def test_a_training_deployment_may_be_overridden_by_its_name(name):
    made = build(TPUConfig, f"per_host_input_for_training={name}")
    assert made.per_host_input_for_training is InputPipelineConfig[name]


@pytest.mark.parametrize(("value", "deployment"), [
    ("true", InputPipelineConfig.PER_HOST_V1), ("false", InputPipelineConfig.PER_SHARD_V1)])
def test_a_training_deployment_may_be_overridden_by_a_bool(value, deployment):
    assert build(TPUConfig, f"per_host_input_for_training={value}").per_host_input_for_training is deployment


def test_an_eval_deployment_may_be_overridden_by_its_name():
    made = build(RunConfig, "tpu_config.eval_training_input_configuration=SLICED")
    assert made.tpu_config.eval_training_input_configuration is InputPipelineConfig.SLICED


@pytest.mark.parametrize("name", ["auto", "require", "off"])
def test_capture_may_be_overridden_by_its_name(name):
    assert build(RunConfig, f"capture={name}").capture is CaptureMode[name]


@pytest.mark.parametrize("name", ["auto", "require", "off"])
def test_capture_may_be_given_by_its_name_in_a_yaml_file(name):
    # YAML reads a bare `off` as false.
    config = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.create(f"capture: {name}"))
    assert OmegaConf.to_object(config).capture is CaptureMode[name]


@pytest.mark.parametrize("name", ["auto", "require", "off"])
def test_capture_may_be_given_as_a_string_in_python(name):
    assert RunConfig(capture=name).capture is CaptureMode[name]
    assert RunConfig().replace(capture=name).capture is CaptureMode[name]


def test_deployments_may_be_given_as_strings_in_python():
    config = TPUConfig(per_host_input_for_training="BROADCAST", eval_training_input_configuration="SLICED")
    assert config.per_host_input_for_training is InputPipelineConfig.BROADCAST
    assert config.eval_training_input_configuration is InputPipelineConfig.SLICED


def test_partition_dims_come_out_as_plain_lists():
    made = build(TPUConfig, "per_host_input_for_training=PER_HOST_V2", "num_cores_per_replica=2",
                 "input_partition_dims=[[1,2],null]")
    assert made.input_partition_dims == [[1, 2], None]
    assert type(made.input_partition_dims) is list
    assert type(made.input_partition_dims[0]) is list


@pytest.mark.parametrize(("override", "match"), [
    ("tpu_config.num_shards=0", "num_shards must be positive"),
    ("tpu_config.iterations_per_loop=0s", "Value must be positive integer value or time-based value"),
    ("tpu_config.eval_training_input_configuration=BROADCAST", "must be PER_HOST_V1 or SLICED; got BROADCAST"),
    ("tpu_config.per_host_input_for_training=PER_CORE", "per_host_input_for_training must be True, False or one of"),
    ("tpu_config.host_call_every_n_steps=0", "host_call_every_n_steps must be a positive int; got 0"),
    ("save_checkpoints_secs=often", "save_checkpoints_secs should be >= 0, or None; got 'often'"),
    ("model_dir=''", "model_dir should be non-empty"),
    ("host_queue_size=0", "host_queue_size must be a positive int; got 0"),
    ("task_type=ps", "task_type must be 'worker' or 'evaluator'; got 'ps'"),
])
def test_a_broken_rule_surfaces_as_tpuspecs_own_error_through_omegaconf(override, match):
    with pytest.raises(ConfigError, match=match):
        build(RunConfig, override)


@pytest.mark.parametrize(("override", "match"), [
    ("tpu_config.num_shards=many", "'many'"),
    ("tpu_config.iterations_per_loop=2.5", "2.5"),
])
def test_a_value_of_another_type_is_refused_by_the_schema(override, match):
    with pytest.raises(ValidationError, match=match):
        build(RunConfig, override)


def test_an_unknown_capture_is_refused():
    with pytest.raises(ValueError, match="sometimes"):
        build(RunConfig, "capture=sometimes")


def test_an_unknown_name_is_refused_by_the_schema():
    with pytest.raises(ConfigKeyError, match="save_checkpoint_steps"):
        build(RunConfig, "save_checkpoint_steps=40")


@pytest.mark.parametrize(("settings", "match"), [
    ({"input_partition_dims": [[1], [1], [1]]}, "one or two elements"),
    ({"input_partition_dims": {"x": [1, 2]}}, "one or two elements"),
    ({"input_partition_dims": [[1, 2]]}, "only supported in PER_HOST_V2 mode"),
    ({"input_partition_dims": [[1, 2]], "per_host_input_for_training": InputPipelineConfig.PER_HOST_V2},
     "requires setting num_cores_per_replica"),
    ({"per_host_input_for_training": InputPipelineConfig.SLICED}, "cannot be SLICED"),
    ({"per_host_input_for_training": 3}, "per_host_input_for_training must be True, False or one of .*; got 3"),
    ({"host_call_every_n_steps": 1.0}, "host_call_every_n_steps must be a positive int"),
    ({"host_call_every_n_steps": True}, "host_call_every_n_steps must be a positive int"),
])
def test_the_other_rules_of_tpu_config(settings, match):
    with pytest.raises(ConfigError, match=match):
        TPUConfig(**settings)


@pytest.mark.parametrize(("settings", "match"), [
    ({"tpu_config": None}, "tpu_config must be a TPUConfig; got NoneType"),
    ({"tpu_config": {"num_shards": 2}}, "tpu_config must be a TPUConfig; got dict"),
    ({"capture": "never"}, "capture must be auto, require or off; got 'never'"),
    ({"capture": 1}, "capture must be auto, require or off; got 1"),
    ({"precision": "bf17"}, "precision must be fp32, bf16, bf16-mixed, or None; got 'bf17'. Did you mean 'bf16'"),
    ({"precision": "bf16_mixed"}, "got 'bf16_mixed'. Did you mean 'bf16-mixed'"),
    ({"precision": "16-mixed"}, "got '16-mixed'. Did you mean 'bf16-mixed'"),
    ({"precision": 32}, "got 32. Did you mean 'fp32'"),
    ({"precision": "exact"}, "got 'exact'.$"),
    ({"show_progress": 1}, "show_progress must be True or False; got 1"),
    ({"host_queue_size": True}, "host_queue_size must be a positive int"),
    ({"save_checkpoints_secs": float("nan")}, "save_checkpoints_secs should be >= 0"),
    ({"save_checkpoints_secs": float("inf")}, "save_checkpoints_secs should be >= 0"),
    ({"keep_checkpoint_max": True}, "keep_checkpoint_max should be >= 0"),
    ({"seed": True}, "seed must be integer"),
])
def test_the_other_rules_of_run_config(settings, match):
    with pytest.raises(ConfigError, match=match):
        RunConfig(**settings)


def test_a_path_object_becomes_a_string():
    assert RunConfig(model_dir=Path("runs") / "a").model_dir == "runs/a"


@pytest.mark.parametrize("model_dir", [5, ["runs"]])
def test_a_model_dir_that_is_no_path_is_refused_by_name(model_dir):
    with pytest.raises(TpuspecError, match="model_dir"):
        RunConfig(model_dir=model_dir)


def test_replace_copies_deeply_what_it_does_not_change():
    config = RunConfig(tpu_config=TPUConfig(
        num_cores_per_replica=2, per_host_input_for_training="PER_HOST_V2", input_partition_dims=[[1, 2]]))
    copy = config.replace(seed=1)
    assert copy.tpu_config == config.tpu_config
    copy.tpu_config.input_partition_dims[0][1] = 4
    assert config.tpu_config.input_partition_dims == [[1, 2]]


def test_replace_keeps_the_class_and_leaves_the_original():
    class MyRunConfig(RunConfig):
        """A user's own."""

    config = MyRunConfig(seed=1)
    assert type(config.replace(seed=2)) is MyRunConfig
    assert config.seed == 1


def test_each_config_has_its_own_tpu_config():
    first, second = RunConfig(), RunConfig()
    first.tpu_config.num_shards = 8
    assert second.tpu_config.num_shards is None


def test_validate_finds_what_was_changed_after_construction():
    config = RunConfig()
    config.host_queue_size = 0
    with pytest.raises(ConfigError, match="host_queue_size"):
        validate(config)
