import re

import pytest
import torch

import tpuspec
from tpuspec import CaptureMode, InputPipelineConfig

_TYPED = """
{model_fn: tpuspec.recipes.digits.model_fn, input_fn: tpuspec.recipes.digits.input_fn,
model: tpuspec.recipes.digits.model, run: {max_steps: 3},
optimizer: {_target_: torch.optim.AdamW, lr: 0.1},
params: {flag: true, opt: null, rate: 0.5, count: 3, word: gelu, sizes: [1.0], deep: {flag: true, rate: 0.5},
         zero: 0, late: '${params.count}'}}
"""


def refused(command, capsys, folder, *arguments):
    """Runs a command that must end with exit code 2, one message and an untouched folder; returns the message."""
    assert command(*arguments) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err and out == ""
    assert list(folder.iterdir()) == []
    return err


def test_settings_of_the_file_and_of_the_command_line_reach_the_trainer(command, calls):
    assert command("config=digits", "params.learning_rate=0.5", "run.seed=7", "tpu.num_shards=4", "quiet=true",
                   "run.capture=off", "tpu.per_host_input_for_training=PER_HOST_V2", "eval_on_tpu=false") == 0
    made = calls.made[0]
    assert made["params"]["learning_rate"] == 0.5 and made["params"]["width"] == 16
    assert (made["train_batch_size"], made["eval_on_tpu"], made["use_tpu"]) == (64, False, True)
    config = made["config"]
    assert isinstance(config, tpuspec.RunConfig)
    assert (config.seed, config.capture, config.show_progress) == (7, CaptureMode.off, False)
    assert config.tpu_config.num_shards == 4
    assert config.tpu_config.per_host_input_for_training is InputPipelineConfig.PER_HOST_V2


def test_save_checkpoints_steps_unsets_the_default_of_the_seconds(command, calls):
    command("config=digits", "run.save_checkpoints_steps=5")
    assert calls.made[0]["config"].save_checkpoints_secs is None


@pytest.mark.parametrize(("argument", "nearest"), [
    ("run.max_step=5", "'run.max_step'; did you mean 'run.max_steps'?"),
    ("parms.x=1", "'parms'; did you mean 'params'?"),
    ("params.learning_rte=1", "'params.learning_rte'; did you mean 'params.learning_rate'? To add a new one, "
                              "write +params.learning_rte=VALUE."),
    ("max_steps=5", "'max_steps'; did you mean 'run.max_steps'?"),
    ("+run.max_step=5", "'run.max_step'; did you mean 'run.max_steps'?"),
    ("++tpu.num_shard=5", "'tpu.num_shard'; did you mean 'tpu.num_shards'?"),
    ("+parms.x=1", "'parms'; did you mean 'params'?"),
    ("zzz=1", "'zzz'. The settings are: mode, model_dir, model_fn,"),
])
def test_unknown_key_is_named_with_the_nearest_one(command, capsys, folder, argument, nearest):
    assert f"there is no setting {nearest}" in refused(command, capsys, folder, "config=digits", argument)


@pytest.mark.parametrize(("argument", "message"), [
    ("run.max_steps=abc", "run.max_steps: Value 'abc' of type 'str' could not be converted to Integer"),
    ("run.max_steps=1.5", "run.max_steps: Value '1.5' of type 'float' could not be converted to Integer"),
    ("run.max_steps=0", "run.max_steps must be positive, or null; got 0."),
    ("run=3", "run: Invalid type assigned"),
    ("quiet=3.5", "quiet: Value '3.5'"),
    ("run.capture=foo", "capture must be auto, require or off; got 'foo'."),
    ("tpu.num_shards=0", "TPUConfig.num_shards must be positive, or None"),
    ("tpu.iterations_per_loop=0", "iterations_per_loop: Value must be positive integer value"),
    ("run.save_checkpoints_secs=5", "cannot be both set"),
    ("~run.max_steps", "run.max_steps cannot be removed; set it to null."),
    ("run.max_steps=null", "mode=train_and_evaluate needs run.max_steps"),
    ("params.width=1,2", "add --multirun"),
    ("a b", "cannot read the argument 'a b'"),
    ("hydra.run.dir=x", "hydra.run.dir is Hydra's own setting and would be ignored"),
    ("hydra/launcher=joblib", "hydra/launcher is Hydra's own setting"),
    ("config=digits", "config= is given twice"),
    ("model_dir=", "model_dir must be a folder, or an address such as gs://bucket/run; got ''"),
    ("params.width=${oc.env:TPUSPEC_NO_SUCH}", "Environment variable 'TPUSPEC_NO_SUCH' not found"),
    ("allow=3", "allow takes a list of packages"),
    ("allow=[.]", "allow takes names of packages"),
    ("model_fn=null", "model_fn: field 'model_fn' is not Optional"),
])
def test_wrong_value_is_one_clear_message(command, capsys, folder, argument, message):
    assert message in refused(command, capsys, folder, "config=digits", argument)


@pytest.mark.parametrize(("argument", "name", "value"), [
    ("params.flag=off", "flag", False), ("params.flag=ON", "flag", True), ("params.flag=no", "flag", False),
    ("params.flag=0", "flag", False), ("params.word=off", "word", "off"), ("params.opt=None", "opt", None),
    ("params.opt=off", "opt", False), ("+params.new=yes", "new", True), ("params.word=None", "word", None),
    ("params.rate=1", "rate", 1.0), ('params.rate="1e-3"', "rate", 0.001), ("params.count=1e2", "count", 100),
    ("params.count=null", "count", None), ("params.opt=[1,a]", "opt", [1, "a"]), ("params.sizes=[3]", "sizes", [3.0]),
    ('params.word="1.10"', "word", "1.10"), ("params.deep.flag=off", "deep", {"flag": False, "rate": 0.5}),
    ("params.late=7", "late", 7), ("params.zero=0.5", "zero", 0.5),
])
def test_value_of_params_takes_the_type_of_its_default(command, calls, user_config, argument, name, value):
    directory = user_config(_TYPED)
    assert command("config=mine", "--config-dir", str(directory), argument) == 0
    got = calls.made[0]["params"][name]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(("argument", "message"), [
    ("params.rate=abc", "params.rate must be a number, as its default, 0.5, is, or null; got 'abc'."),
    ("params.rate=true", "params.rate must be a number"), ("params.count=1.5", "write the default as 3.0 in the"),
    ("params.count=true", "params.count must be a whole number"), ("params.flag=maybe", "params.flag must be true or"),
    ("params.flag=2", "params.flag must be true or false"), ("params.word=1.10", "quote it twice: 'params.word="),
    ("params.sizes=3", "params.sizes must be a list"), ("params.sizes=[a]", "params.sizes[0] must be a number"),
    ("params.deep=3", "params.deep must be a mapping"), ("params.deep.rate=x", "params.deep.rate must be a number"),
    ("optimizer.lr=abc", "optimizer.lr must be a number"),
])
def test_value_of_another_type_than_its_default_is_refused(command, capsys, folder, user_config, argument, message):
    directory = user_config(_TYPED)
    assert message in refused(command, capsys, folder, "config=mine", "--config-dir", str(directory), argument)


def test_value_of_another_type_in_a_sweep_runs_no_job(command, calls, capsys, folder):
    message = refused(command, capsys, folder, "-m", "config=digits", "params.learning_rate=0.1,abc")
    assert "params.learning_rate must be a number" in message and calls.made == []


def test_optimizers_arguments_take_the_types_of_its_class(command, calls, user_config):
    directory = user_config(_TYPED)
    assert command("config=mine", "--config-dir", str(directory), "+optimizer.amsgrad=off", "optimizer.lr=1") == 0
    (group,) = calls.made[0]["optimizer"](torch.nn.Linear(1, 1), {}).param_groups
    assert group["amsgrad"] is False and group["lr"] == 1.0


def test_unknown_mode_lists_the_modes(command, capsys, folder):
    message = refused(command, capsys, folder, "config=digits", "mode=tain")
    assert "mode must be one of train, evaluate, predict, train_and_evaluate, export, plan; got 'tain'." in message


@pytest.mark.parametrize("arguments", [
    ("mode=evaluate", "run.max_steps=5"), ("mode=predict", "run.steps=5"), ("mode=train", "run.eval_steps=5"),
    ("run.steps=5",), ("mode=predict", "eval_batch_size=5"), ("mode=evaluate", "export.name=x"),
    ("mode=export", "run.max_steps=5"), ("mode=train", "serving_input_fn=tpuspec.recipes.digits.serving_input_fn"),
    ("serving_input_fn=tpuspec.recipes.digits.serving_input_fn",), ("export.to_cpu=false",), ("export.to_tpu=false",),
    ("export.exporters=[latest,final]", "export.metric=accuracy"), ("export.higher_is_better=true",),
    ("export.exporters=[final]", "export.exports_to_keep=2"),
])
def test_setting_that_the_mode_would_ignore_is_refused(command, capsys, folder, arguments):
    message = refused(command, capsys, folder, "config=digits", *arguments)
    assert f"{arguments[-1].split('=')[0]} has no effect with mode=" in message


def test_steps_and_max_steps_together_are_refused(command, capsys, folder):
    message = refused(command, capsys, folder, "config=digits", "mode=train", "run.steps=5")
    assert "run.steps=5 and run.max_steps=1200 are both set" in message


def test_no_config_lists_the_choices(command, capsys, folder, user_config):
    message = refused(command, capsys, folder, "--config-dir", str(user_config("# My own model\n")))
    assert re.search(r"config=digits +Handwritten digits", message)
    assert re.search(r"config=mine +My own model", message)


def test_misspelt_config_key_is_named(command, capsys, folder):
    assert "config= is missing (you wrote confg=)" in refused(command, capsys, folder, "confg=digits")


def test_unknown_config_lists_the_choices_and_the_nearest(command, capsys, folder):
    message = refused(command, capsys, folder, "config=digit")
    assert "There is no config=digit; did you mean config=digits?" in message
    assert "Handwritten digits" in message


@pytest.mark.parametrize(("text", "message"), [
    ("rnu: {max_steps: 3}", "mine.yaml: there is no setting 'rnu'; did you mean 'run'?"),
    ("run: {max_steps: x}", "mine.yaml: run.max_steps: Value 'x' of type 'str'"),
    ("run: [", "mine.yaml"),
    ("mode: train", "input_fn is not set; config=mine must set it"),
    ("allow: [os.]", "a config file cannot allow its own names"),
    ("defaults: [digits, _self_]\nhydra: {callbacks: {x: {_target_: os.system}}}",
     "hydra.callbacks is Hydra's own setting"),
    ("defaults: [digits, _self_]\nhydra: {run: {dir: elsewhere}}", "hydra.run is Hydra's own setting"),
])
def test_wrong_file_is_one_clear_message(command, capsys, folder, user_config, text, message):
    assert message in refused(command, capsys, folder, "config=mine", "--config-dir", str(user_config(text)))


def test_file_without_package_header_is_refused(command, capsys, folder, user_config):
    directory = user_config("mode: train", header="")
    message = refused(command, capsys, folder, "config=mine", "--config-dir", str(directory))
    assert "mine.yaml must begin with '# @package _global_'" in message


def test_file_of_a_packaged_name_is_refused(command, capsys, folder, user_config):
    directory = user_config("mode: train", name="digits")
    assert "Rename yours" in refused(command, capsys, folder, "config=digits", "--config-dir", str(directory))


def test_config_dir_without_configs_is_refused(command, capsys, folder, tmp_path):
    (tmp_path / "none").mkdir()
    message = refused(command, capsys, folder, "config=digits", "--config-dir", str(tmp_path / "none"))
    assert "holds no config/NAME.yaml" in message


def test_config_dir_that_does_not_exist_is_refused(command, capsys, folder):
    assert "--config-dir nowhere is no folder" in refused(command, capsys, folder, "--config-dir", "nowhere")


def test_users_config_extends_a_packaged_one(command, calls, user_config):
    directory = user_config("defaults: [digits, _self_]\nparams: {width: 8}\nrun: {max_steps: 5}\n")
    assert command("config=mine", "--config-dir", str(directory)) == 0
    assert calls.made[0]["params"]["width"] == 8 and calls.made[0]["params"]["dropout"] == 0.25
    assert calls.made[0]["model_dir"] == "runs/mine"
    verb, arguments = calls.done[0]
    assert (verb, arguments["max_steps"]) == ("train", 5)


def test_hydra_interpolations_name_the_model_dir(command, calls):
    assert command("config=digits", "model_dir=runs/${hydra:runtime.choices.config}-${params.width}") == 0
    assert calls.made[0]["model_dir"] == "runs/digits-16"


def test_sweep_gives_each_job_a_folder_below_the_sweeps(command, calls):
    assert command("--multirun", "config=digits", "params.learning_rate=0.001,0.003", "run.max_steps=20") == 0
    folders = [made["model_dir"] for made in calls.made]
    assert [made["params"]["learning_rate"] for made in calls.made] == [0.001, 0.003]
    pattern = r"runs/digits_sweep/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d/%s"
    assert re.fullmatch(pattern % "0_params.learning_rate=0.001", folders[0])
    assert re.fullmatch(pattern % "1_params.learning_rate=0.003", folders[1])


def test_sweep_options_and_settings_stand_in_any_order(command, calls):
    assert command("params.width=2,4", "--multirun", "config=digits", "params.dropout=0,0.5", "model_dir=out") == 0
    assert [made["model_dir"] for made in calls.made] == [
        "out/0_params.width=2_params.dropout=0", "out/1_params.width=2_params.dropout=0.5",
        "out/2_params.width=4_params.dropout=0", "out/3_params.width=4_params.dropout=0.5"]


def test_sweep_keeps_model_dirs_that_are_different_already(command, calls):
    assert command("-m", "config=digits", "params.width=2,4", "model_dir=out/${params.width}-${hydra:job.num}") == 0
    assert [made["model_dir"] for made in calls.made] == ["out/2-0", "out/4-1"]


def test_sweep_over_a_range_runs_each_value(command, calls):
    assert command("-m", "config=digits", "params.width=range(2,8,3)") == 0
    assert [made["params"]["width"] for made in calls.made] == [2, 5]


def test_one_wrong_job_of_a_sweep_runs_none(command, calls, capsys, folder):
    message = refused(command, capsys, folder, "-m", "config=digits", "tpu.num_shards=1,0")
    assert "num_shards must be positive" in message and calls.made == []


def test_sweep_over_replicas_is_refused_since_a_process_starts_its_devices_once(command, calls, capsys, folder):
    message = refused(command, capsys, folder, "-m", "config=digits", "tpu.num_shards=1,2")
    assert "tpu.num_shards cannot be swept" in message and calls.made == []


def test_an_export_without_a_serving_input_fn_or_of_a_strange_name_is_refused(command, capsys, folder):
    message = refused(command, capsys, folder, "config=digits", "mode=export", "serving_input_fn=null")
    assert "mode=export with exports needs serving_input_fn" in message
    message = refused(command, capsys, folder, "config=digits", "mode=export", "export.name=../x")
    assert "export.name must be 1 to 100 letters" in message


def test_exporters_without_a_serving_input_fn_or_of_one_kind_twice_are_refused(command, capsys, folder):
    message = refused(command, capsys, folder, "config=digits", "export.exporters=[best]", "serving_input_fn=null")
    assert "mode=train_and_evaluate with exports needs serving_input_fn" in message
    message = refused(command, capsys, folder, "config=digits", "export.exporters=[best,latest,best]")
    assert "export.exporters names one kind twice; got ['best', 'latest', 'best']." in message
