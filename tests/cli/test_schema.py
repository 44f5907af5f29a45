import dataclasses

from omegaconf import OmegaConf

from tpuspec import RunConfig
from tpuspec.cli.schema import RunSettings, TrainConfig, run_config


def test_run_has_every_field_of_run_config_and_the_steps():
    fields = {f.name for f in dataclasses.fields(RunConfig)} - {"model_dir", "tpu_config", "show_progress", "device"}
    assert {f.name for f in dataclasses.fields(RunSettings)} == fields | {"max_steps", "steps", "eval_steps"}


def test_defaults_make_the_default_run_config():
    settings = OmegaConf.to_object(OmegaConf.merge(
        OmegaConf.structured(TrainConfig), {"model_fn": "a.b", "input_fn": "a.b"}))
    assert isinstance(settings, TrainConfig)
    assert run_config(settings) == RunConfig()
