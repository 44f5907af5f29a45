import json
from datetime import UTC, datetime

import pytest
from omegaconf import OmegaConf

from tpuspec.cli.record import describe_environment, replacing, write_record
from tpuspec.errors import ConfigError


def test_settings_and_environment_are_written_before_training(command, calls, folder):
    calls.error = RuntimeError("at the first step")
    assert command("config=digits", "model_dir=out", "params.width=3") == 1
    saved = OmegaConf.load(folder / "out" / "config.yaml")
    assert saved.params.width == 3 and saved.model_dir == "out" and saved.mode == "train_and_evaluate"
    environment = json.loads((folder / "out" / "environment.json").read_text())
    assert environment["command"][-3:] == ["config=digits", "model_dir=out", "params.width=3"]
    assert environment["packages"]["torch"].startswith("2.")
    assert {"python", "platform", "PJRT_DEVICE", "started"} <= set(environment)


def test_evaluation_keeps_the_record_of_the_training(command, calls, folder):
    command("config=digits", "model_dir=out", "params.width=3")
    command("config=digits", "model_dir=out", "mode=evaluate")
    assert OmegaConf.load(folder / "out" / "config.yaml").params.width == 3


def test_start_time_is_an_argument():
    started = datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC)
    environment = describe_environment(["config=digits"], version="1.2", started=started)
    assert (environment["tpuspec"], environment["started"]) == ("1.2", "2025-01-02T03:04:05+00:00")


@pytest.mark.parametrize("model_dir", ["file/below", "n" * 300])
def test_unwritable_model_dir_is_refused_before_training(command, calls, capsys, folder, model_dir):
    (folder / "file").touch()
    assert command("config=digits", f"model_dir={model_dir}") == 2
    message = capsys.readouterr().err
    assert "cannot be written" in message and "Give a folder that you may write, model_dir=DIR." in message
    assert calls.done == []


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="half"), replacing(path) as file:
        file.write("new")
        raise RuntimeError("half")
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"] and path.read_text() == "old"


def test_record_has_unicode_and_a_warning_that_it_is_data(tmp_path):
    write_record(str(tmp_path / "ä b"), "name: 数\n", {})
    assert (tmp_path / "ä b" / "config.yaml").read_text(encoding="utf-8").endswith("nothing reads it back.\nname: 数\n")


def test_record_that_cannot_be_written_names_the_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file cannot be written"):
        write_record(str(tmp_path / "file"), "", {})
