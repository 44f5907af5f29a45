"""Faults of settings and names: exit code 2, nothing created, nothing of a stranger's executed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.regression import make_trainer, rows_input
from tpuspec import EvalSpec, train
from tpuspec.checkpoint.__main__ import main as checkpoint_main
from tpuspec.cli.launch import report
from tpuspec.errors import ConfigError, ConfigTypeError


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working folder."""
    path = tmp_path / "work"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


@pytest.mark.parametrize(("argument", "says"), [
    ("run.max_step=5", "max_steps"),
    ("params.widht=5", "width"),
    ("rnu.max_steps=5", "run"),
    ("tpu.num_shard=2", "num_shards"),
    ("config=digit", "digits"),
    ("run.max_steps=many", "run.max_steps"),
    ("run.save_checkpoints_steps=1.5", "save_checkpoints_steps"),
    ("train_batch_size=-4", "train_batch_size"),
    ("run.capture=sometimes", "capture"),
    ("=5", "="),
    ("params.width", "params.width"),
    ("run={", "run={"),
])
def test_fault_47_a_wrong_setting_is_named_with_the_nearest_and_nothing_is_created(folder, capsys, argument, says):
    arguments = [argument] if argument.startswith("config=") else ["config=digits", argument]
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error
    assert list(folder.iterdir()) == []


CANARY = "touch canary"
HOSTILE = [
    ("model_fn=os.system",), ("model_fn=posix.system",), ("model_fn=tpuspec.recipes.digits.os.system",),
    ("model_fn=tpuspec.train.os.system",), ("input_fn=builtins.exec",), ("model=subprocess.call",),
    ("report=os.system",), ("scheduler=os.system",), ("optimizer={_target_: os.system, command: touch canary}",),
    ("optimizer={_target_: torch.optim.os.system, command: touch canary}",),
    ("scheduler={_target_: os.system, command: touch canary}",),
    ("optimizer={_target_: torch.optim.AdamW, lr: {_target_: os.system, _args_: [touch canary]}}",),
    ("+params.x={_target_: os.system, _args_: [touch canary]}",),
    ("+params.x=[{_target_: os.system, _args_: [touch canary]}]",),
]


@pytest.mark.parametrize("arguments", HOSTILE, ids=lambda arguments: arguments[0][:40])
def test_fault_48_a_target_outside_the_allowed_names_is_refused_and_not_run(folder, capsys, arguments):
    assert train.main(["config=digits", *arguments]) == 2
    error = capsys.readouterr().err
    assert "refused" in error or "there is no module" in error
    assert list(folder.iterdir()) == [], "the canary"


@pytest.mark.parametrize("text", [
    "model_fn: os.system", "report: os.system", "optimizer: {_target_: os.system, command: touch canary}",
    "allow: [os.]\nmodel_fn: os.system", "params: {x: {_target_: os.system, _args_: [touch canary]}}",
])
def test_fault_48_a_config_file_of_a_stranger_runs_nothing(folder, tmp_path, capsys, text):
    (tmp_path / "theirs" / "config").mkdir(parents=True)
    (tmp_path / "theirs" / "config" / "mine.yaml").write_text(
        f"# @package _global_\ndefaults: [digits, _self_]\n{text}\n")
    assert train.main(["config=mine", "--config-dir", str(tmp_path / "theirs")]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert list(folder.iterdir()) == []


NAMES = ["../x", "/x", "a/../../x", "a/b", "x\0y", "-x", ".x", "..", " x", "x" * 300, "x\ny", "ü" * 101]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name)[:12])
def test_fault_49_a_name_that_leaves_its_folder_is_refused_with_code_2(tmp_path, name):
    trainer = make_trainer(tmp_path / "runs" / "run").train(rows_input(), max_steps=2)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="name must be 1 to 100 letters") as caught:
        trainer.evaluate(rows_input(), name=name)
    assert report(caught.value) == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_fault_49_a_name_of_another_type_is_refused_with_code_2(tmp_path):
    with pytest.raises(ConfigTypeError, match="name must be a str") as caught:
        make_trainer(tmp_path).evaluate(rows_input(), name=7)
    assert report(caught.value) == 2


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name)[:12])
def test_fault_49_a_name_of_evaluations_is_refused_before_training(name):
    with pytest.raises(ConfigError, match="EvalSpec name must be 1 to 100 letters") as caught:
        EvalSpec(rows_input(), name=name)
    assert report(caught.value) == 2


@pytest.mark.parametrize("model_dir", ["a\0b", '""', "x" * 300, "nosuch://bucket/x"], ids=lambda name: name[:8])
def test_fault_49_a_model_dir_that_cannot_be_is_refused_with_code_2(folder, capsys, model_dir):
    assert train.main(["config=digits", f"model_dir={model_dir}"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("path", ["../x", "x\0y", "-x", "x" * 300, "", "."], ids=lambda path: repr(path)[:8])
def test_fault_49_a_checkpoint_path_that_is_none_is_refused_and_makes_nothing(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(tmp_path / "run").train(rows_input(), max_steps=2)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(Exception, match="is no checkpoint") as caught:
        trainer.evaluate(rows_input(), checkpoint_path=path)
    assert report(caught.value) == 3
    assert [found for found in sorted(tmp_path.rglob("*")) if "eval" not in found.name] == before


def test_fault_50_a_config_beside_a_checkpoint_is_data(folder, capsys):
    make_trainer(folder / "run").train(rows_input(), max_steps=2)
    text = ("model_fn: os.system\noptimizer: {_target_: os.system, command: touch canary}\n"
            "x: !!python/object/apply:os.system [touch canary]\n")
    for name in ("config.yaml", "environment.json", "train.yaml", "hydra.yaml"):
        (folder / "run" / name).write_text(text)
        (folder / "run" / "checkpoint-2" / name).write_text(text)
    assert make_trainer(folder / "run").train(rows_input(), max_steps=4).global_step() == 4
    assert checkpoint_main(["show", "run"]) == 0
    assert train.main(["config=digits", "model_dir=run", "mode=train", "run.max_steps=4"]) == 0, "it is complete"
    assert os.listdir(folder) == ["run"], "the canary"
    assert not list(folder.rglob("canary"))


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name)[:12])
def test_fault_49_a_name_of_exports_that_leaves_their_folder_is_refused_with_code_2(folder, capsys, name):
    assert train.main(["config=digits", "mode=export", f"export.name={json.dumps(name)}"]) == 2
    error = capsys.readouterr().err
    assert "export.name must be 1 to 100 letters" in error and "Traceback" not in error
    assert list(folder.iterdir()) == []
