import json

import pytest

from tpuspec.errors import CheckpointError, ConfigError, ConfigTypeError, DeviceError, InputError


def test_done_is_0_and_the_last_lines_name_the_score_and_the_tensorboard_folder(command, calls, capsys):
    assert command("config=digits", "run.max_steps=20", "model_dir=out") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-2:] == ["evaluation at step 20: accuracy 0.75, loss 0.25",
                        "TensorBoard: tensorboard --logdir out"]
    assert [name for name, _ in calls.done] == ["train", "evaluate"]


def test_complete_training_is_said_and_evaluated(command, calls, capsys, folder):
    calls.global_step = 1200
    assert command("config=digits") == 0
    assert "training is complete: runs/digits is at step 1200" in capsys.readouterr().out
    assert [name for name, _ in calls.done] == ["evaluate"]
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(("mode", "done"), [("train", "train"), ("evaluate", "evaluate"), ("predict", "predict"),
                                            ("export", "export")])
def test_mode_does_one_thing(command, calls, mode, done):
    calls.global_step = 5
    assert command("config=digits", f"mode={mode}") == 0
    assert [name for name, _ in calls.done] == [done]


def test_steps_go_to_train_and_eval_steps_to_evaluate(command, calls):
    command("config=digits", "mode=train", "run.steps=7", "run.max_steps=null")
    command("config=digits", "mode=evaluate", "run.eval_steps=2")
    assert calls.done == [("train", {"steps": 7, "max_steps": None}), ("evaluate", {"steps": 2})]


def test_predictions_are_lines_of_json_and_the_first_are_shown(command, calls, capsys, folder):
    calls.global_step = 5
    assert command("config=digits", "mode=predict", "model_dir=out") == 0
    lines = (folder / "out" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"classes": row, "scores": [0.5, row]} for row in range(5)]
    assert capsys.readouterr().out.splitlines() == [*lines[:3], "5 predictions: out/predictions.jsonl"]


def test_failed_prediction_leaves_no_file(command, calls, folder):
    calls.global_step, calls.error = 5, RuntimeError("no")
    assert command("config=digits", "mode=predict", "model_dir=out") == 1
    assert list((folder / "out").iterdir()) == []


def test_an_export_goes_below_model_dir_or_where_it_is_told_and_its_folder_is_printed(command, calls, capsys):
    calls.global_step = 5
    assert command("config=digits", "mode=export", "model_dir=out") == 0
    assert capsys.readouterr().out.splitlines() == [
        "  takes  image: float32 [batch, 8, 8]", "  serving_default  classes: int64 [batch]",
        "export: out/export/serving/1700000000"]
    assert command("config=digits", "mode=export", "model_dir=out", "export.folder=here", "export.name=beta",
                   "export.checkpoint_path=out/checkpoint-3", "export.to_tpu=false") == 0
    assert [arguments for _, arguments in calls.done] == [
        {"base": "out/export/serving", "checkpoint_path": None},
        {"base": "here/beta", "checkpoint_path": "out/checkpoint-3"}]
    assert [(made["export_to_tpu"], made["export_to_cpu"]) for made in calls.made] == [(True, True), (False, True)]


@pytest.mark.parametrize("mode", ["evaluate", "predict", "export"])
def test_mode_without_a_checkpoint_is_refused(command, calls, capsys, folder, mode):
    assert command("config=digits", f"mode={mode}") == 2
    assert f"mode={mode} needs a checkpoint, and model_dir runs/digits holds none" in capsys.readouterr().err
    assert calls.done == [] and list(folder.iterdir()) == []


@pytest.mark.parametrize(("error", "code"), [
    (RuntimeError("broken"), 1), (InputError("broken"), 1), (DeviceError("broken"), 1), (ConfigError("broken"), 2),
    (ConfigTypeError("broken"), 2), (CheckpointError("broken"), 3), (KeyboardInterrupt(), 130),
])
def test_error_has_its_exit_code(command, calls, capsys, error, code):
    calls.error = error
    assert command("config=digits") == code
    err = capsys.readouterr().err
    assert err.splitlines()[-1].endswith("broken" if code != 130 else "nothing was left to be saved.")
    assert err.startswith("error: " if code != 130 else "interrupted by SIGINT: ")
    assert ("Traceback" in err) == (code == 1 and not isinstance(error, DeviceError))


def test_hydra_full_error_shows_the_traceback_of_a_config_error(command, capsys, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert command("config=nothing") == 2
    assert "Traceback" in capsys.readouterr().err


def test_system_exit_of_user_code_is_not_swallowed(command, calls):
    calls.error = SystemExit(5)
    with pytest.raises(SystemExit, match="5"):
        command("config=digits")


def test_sweep_runs_on_after_a_failure_which_decides_the_exit_code(command, calls, capsys):
    calls.error, calls.fails_at_job = CheckpointError("broken"), 0
    assert command("-m", "config=digits", "params.width=2,4", "model_dir=out") == 3
    out = capsys.readouterr().out
    assert out.splitlines()[-3:] == ["0_params.width=2  failed with exit code 3",
                                     "1_params.width=4  accuracy 0.75, loss 0.25",
                                     "TensorBoard: tensorboard --logdir out"]


def test_interrupt_ends_a_sweep(command, calls):
    calls.error = KeyboardInterrupt()
    assert command("-m", "config=digits", "params.width=2,4") == 130
    assert len(calls.made) == 1


def test_help_needs_no_config_and_names_modes_and_choices(command, capsys, folder):
    assert command("--help") == 0
    out = capsys.readouterr().out
    for text in ("mode=train_and_evaluate", "config=digits", "--multirun", "allow=", "run.max_steps", "Exit codes"):
        assert text in out
    assert list(folder.iterdir()) == []


def test_cfg_job_prints_the_settings_and_stops(command, calls, capsys, folder):
    assert command("config=digits", "--cfg", "job", "params.width=3") == 0
    out = capsys.readouterr().out
    assert "model_dir: runs/digits\n" in out and "  width: 3\n" in out and "\nallow:" not in out
    assert calls.made == [] and list(folder.iterdir()) == []


def test_version_is_printed(command, capsys):
    assert command("--version") == 0
    assert capsys.readouterr().out.startswith("tpuspec ")


@pytest.mark.parametrize("option", ["--info", "--hydra-help", "--multi"])
def test_unknown_option_is_refused(command, capsys, option):
    assert command("config=digits", option) == 2
    assert f"error: unrecognized arguments: {option}. See python -m tpuspec.train --help." in capsys.readouterr().err


def test_quiet_option_is_the_setting(command, calls):
    assert command("config=digits", "--quiet") == 0
    assert calls.made[0]["config"].show_progress is False


@pytest.mark.parametrize(("overrides", "evaluates"), [
    ([], True), (["mode=train"], False),
    (["run.save_checkpoints_steps=null"], False),
])
def test_train_and_evaluate_evaluates_every_checkpoint_where_there_are_any(command, calls, overrides, evaluates):
    assert command("config=digits", *overrides) == 0
    assert ("saving_listeners" in calls.done[0][1]) is evaluates
