"""Faults of what a run is to go on from, as its user meets them: through the Trainer and the command line."""

from __future__ import annotations

import json
import os
import pickle
import zlib
from pathlib import Path

import fsspec
import pytest
import torch
from torch import nn

from tests.checkpoints import rewrite_manifest
from tests.regression import make_trainer, num_compiles, regression_rows, rows_input
from tpuspec import train
from tpuspec.checkpoint.__main__ import main
from tpuspec.checkpoint.store import CheckpointStore
from tpuspec.cli.launch import report
from tpuspec.errors import CheckpointError, ConfigError


@pytest.mark.parametrize("below", ["file", "file/run"])
def test_fault_08_a_model_dir_that_cannot_be_written_is_refused_before_compiling(tmp_path, capsys, below):
    (tmp_path / "file").write_text("not a folder")
    trainer = make_trainer(tmp_path / below)
    before = num_compiles()
    for call in (lambda: trainer.train(rows_input(), max_steps=2), lambda: trainer.evaluate(rows_input())):
        with pytest.raises(ConfigError, match="model_dir must be a folder that can be written"):
            call()
    assert num_compiles() == before
    assert train.main(["config=digits", f"model_dir={tmp_path / below}"]) == 2
    assert num_compiles() == before
    error = capsys.readouterr().err
    assert "cannot be written" in error and str(tmp_path / "file") in error and "Traceback" not in error
    assert (tmp_path / "file").read_text() == "not a folder"


def test_fault_08_an_address_that_cannot_be_written_is_refused_before_compiling(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise PermissionError("403")

    trainer = make_trainer(f"memory:/{tmp_path}")
    before = num_compiles()
    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "pipe_file", fail)
    with pytest.raises(ConfigError, match=r"model_dir must be a folder that can be written; 'memory://.*403"):
        trainer.train(rows_input(), max_steps=2)
    assert num_compiles() == before


@pytest.fixture
def trained(tmp_path):
    """A model_dir with checkpoints of steps 0 and 2."""
    make_trainer(tmp_path / "run").train(rows_input(), max_steps=2)
    return tmp_path / "run"


def _empty(folder: Path) -> None:
    folder.mkdir()


def _foreign(folder: Path) -> None:
    folder.mkdir()
    torch.save({"w": torch.ones(1)}, folder / "pytorch_model.bin")


def _cut_off(folder: Path) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((folder.parent / "checkpoint-2" / "model.safetensors").read_bytes())


@pytest.mark.parametrize("make", [_empty, _foreign, _cut_off])
def test_fault_15_what_is_no_checkpoint_is_passed_over_with_the_reason(trained, make, caplog, capsys):
    make(trained / "checkpoint-9")
    trainer = make_trainer(trained)
    assert trainer.latest_checkpoint() == str(trained / "checkpoint-2")
    assert trainer.train(rows_input(), max_steps=4).global_step() == 4
    told = [record.message for record in caplog.records if "checkpoint-9 is passed over" in record.message]
    assert len(told) == 1 and "without a manifest" in told[0]
    with pytest.raises(CheckpointError, match="checkpoint-9' is no checkpoint: it has no manifest.json") as caught:
        trainer.evaluate(rows_input(), checkpoint_path=trained / "checkpoint-9")
    assert report(caught.value) == 3
    assert main(["show", str(trained / "checkpoint-9")]) == 3
    assert (trained / "checkpoint-9").is_dir(), "what is not ours stays"


def test_fault_15_a_folder_of_a_save_that_was_cut_off_is_no_checkpoint(trained):
    os.rename(trained / "checkpoint-2", trained / ".tmp-checkpoint-2-0123abcd")
    with pytest.raises(CheckpointError, match="does not exist"):
        make_trainer(trained).evaluate(rows_input(), checkpoint_path=trained / "checkpoint-2")
    assert make_trainer(trained).latest_checkpoint() == str(trained / "checkpoint-0")


def test_fault_16_a_newer_format_is_refused_and_left_alone(trained, capsys):
    before = rewrite_manifest(trained / "checkpoint-2", format_version=99, needs_tpuspec="9.1").read_bytes()
    for call in (lambda: make_trainer(trained).train(rows_input(), max_steps=4),
                 lambda: make_trainer(trained).evaluate(rows_input())):
        with pytest.raises(CheckpointError, match=r"needs tpuspec >= 9\.1") as caught:
            call()
        assert report(caught.value) == 3
    assert main(["verify", str(trained)]) == 3
    assert sorted(path.name for path in trained.glob("checkpoint-*")) == ["checkpoint-0", "checkpoint-2"]
    assert (trained / "checkpoint-2" / "manifest.json").read_bytes() == before


class Other(nn.Module):
    """A missing, an unexpected and a differently shaped name against nn.Linear(1, 1)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2, 1), 7.0))
        self.gain = nn.Parameter(torch.full((1,), 7.0))

    def forward(self, x):
        return x * self.gain + self.weight.sum()


@pytest.mark.parametrize("use_tpu", [True, False])
def test_fault_17_another_model_is_refused_with_all_names_and_nothing_is_loaded(trained, use_tpu):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    trainer = make_trainer(trained, model=lambda params: Other(), use_tpu=use_tpu)
    with pytest.raises(CheckpointError, match="mismatch") as caught:
        trainer.train(rows_input(), max_steps=4)
    for line in ("missing in the checkpoint: gain", "not in the model: bias",
                 "weight is [1, 1] in the checkpoint, [2, 1] in the model"):
        assert line in str(caught.value)
    assert report(caught.value) == 3
    module = trainer._sessions[use_tpu].module
    assert all(bool((value.detach().cpu() == 7.0).all()) for value in module.parameters())
    after = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file() and path.name != ".writer.lock"}
    assert after == {path: content for path, content in before.items() if path.name != ".writer.lock"}


def test_fault_17_another_optimizer_is_refused_before_the_model_is_loaded(trained):
    weight = None

    def model(params):
        nonlocal weight
        module = nn.Linear(1, 1)
        weight = module.weight.detach().clone()
        return module

    trainer = make_trainer(trained, model=model,
                           optimizer=lambda module, params: torch.optim.AdamW(module.parameters()))
    with pytest.raises(CheckpointError, match="optimizer is AdamW, the checkpoint's is SGD"):
        trainer.train(rows_input(), max_steps=4)
    assert torch.equal(trainer._sessions[True].module.weight.detach().cpu(), weight)


class Bomb:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (os.mkdir, (str(self.canary),))


@pytest.mark.parametrize("dump", [pickle.dump, torch.save])
@pytest.mark.parametrize("max_shard_bytes", [1, 10**9], ids=["shards", "whole"])
def test_fault_19_a_pickle_under_every_accepted_name_is_never_executed(tmp_path, dump, max_shard_bytes, capsys):
    config = {"checkpoint_max_shard_bytes": max_shard_bytes}
    make_trainer(tmp_path / "run", **config).train(rows_input(), max_steps=2)
    newest, canary = tmp_path / "run" / "checkpoint-2", tmp_path / "canary"
    names = sorted(os.listdir(newest))
    assert len(names) == 4 if max_shard_bytes > 1 else len(names) > 4
    for name in names:
        content = (newest / name).read_bytes()
        with (newest / name).open("wb") as file:
            dump(Bomb(canary), file)
        if name != "manifest.json":  # even one that the manifest vouches for
            bomb = (newest / name).read_bytes()
            original = (newest / "manifest.json").read_bytes()
            files = json.loads(original)["files"]
            rewrite_manifest(newest, files=files | {name: {"size": len(bomb), "crc32": zlib.crc32(bomb)}})
        for command in ("list", "verify", "show"):
            main([command, str(newest)])
        with pytest.raises((CheckpointError, ValueError), match=r"damaged|JSON|utf-8|codec|Expecting"):
            CheckpointStore(tmp_path / "run").load(newest)
        if name != "manifest.json":
            (newest / "manifest.json").write_bytes(original)
        (newest / name).write_bytes(content)
    # Names of other tools, which hold pickles, are not read at all.
    for name in ("pytorch_model.bin", "optimizer.pt", "model.pt", "state.pkl", "checkpoint"):
        with (newest / name).open("wb") as file:
            dump(Bomb(canary), file)
    assert make_trainer(tmp_path / "run").train(rows_input(), max_steps=4).global_step() == 4
    assert not canary.exists()


def test_fault_20_a_hostile_checkpoint_is_refused_with_code_3(trained, capsys):
    rewrite_manifest(trained / "checkpoint-2", files={"../../secret": {"size": 1, "crc32": 1}})
    with pytest.raises(CheckpointError, match="names files outside its folder") as caught:
        make_trainer(trained).evaluate(rows_input(), checkpoint_path=trained / "checkpoint-2")
    assert report(caught.value) == 3
    assert main(["show", str(trained / "checkpoint-2")]) == 3


def test_fault_20_a_link_in_the_place_of_a_checkpoint_is_refused(trained, tmp_path):
    os.rename(trained / "checkpoint-2", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", trained / "checkpoint-2")
    trainer = make_trainer(trained)
    assert trainer.latest_checkpoint() == str(trained / "checkpoint-0")
    with pytest.raises(CheckpointError, match="is no checkpoint that can be read"):
        trainer.evaluate(rows_input(), checkpoint_path=trained / "checkpoint-2")


@pytest.mark.parametrize("missing", ["input", "random"])
def test_fault_21_a_checkpoint_without_position_or_random_state_is_refused_unless_allowed(trained, missing):
    store = CheckpointStore(trained)
    state = store.load(store.path(2))
    del state.extra[missing]
    store.save(state)
    with pytest.raises(CheckpointError, match=rf"cannot be resumed exactly: .*lacks {missing}.*allow_inex") as caught:
        make_trainer(trained).train(lambda params: regression_rows(16), max_steps=4)
    assert report(caught.value) == 3
    trainer = make_trainer(trained, allow_inexact_resume=True).train(lambda params: regression_rows(16), max_steps=4)
    assert trainer.global_step() == 4
