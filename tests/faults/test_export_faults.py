"""Faults of an export: it is whole or not there, and the checkpoint that it reads stays."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

import tpuspec
from tests.checkpoints import damaged_steps
from tests.faults.system_calls import Killed, SystemCalls, system_calls
from tests.full_disk import SmallDisk, full_at
from tests.models import serving_input_fn
from tests.regression import make_trainer, rows_input
from tpuspec.checkpoint.store import CheckpointStore
from tpuspec.checkpoint.tensors import encode_tensors
from tpuspec.errors import ConfigError, ExportError
from tpuspec.export import load
from tpuspec.export.bundle import CPU_TAGS, write_bundle
from tpuspec.export.program import trace
from tpuspec.loops.export_folder import commit_next, writing_into
from tpuspec.spec.export_output import PredictOutput

NATIVE = "use_tpu=false"
MOST_SECONDS, SECONDS_AT_ONCE = 20.0, 10.0  # as in test_signals


def visible(base: Path) -> list[str]:
    """What a server that lists the folder would take."""
    return sorted(name for name in os.listdir(base) if not name.startswith(".")) if base.exists() else []


@pytest.fixture(scope="module")
def trained_run(commands, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    ended = commands.run(folder, "quiet=true", "mode=train", NATIVE, "run.max_steps=5")
    assert (ended.code, ended.steps()) == (0, [0, 5])
    return ended.model_dir


@pytest.mark.slow
@pytest.mark.parametrize(("how", "place"), [
    *(("SIGTERM", place) for place in ("export", "serving_input_fn", "export_trace", "export_files")),
    ("SIGINT", "export_files")])
def test_fault_22_23_a_signal_during_export_ends_at_once_and_leaves_nothing_of_it(
        commands, tmp_path, trained_run, place, how):
    ended = commands.run(tmp_path, "quiet=true", "mode=export", NATIVE, f"model_dir={trained_run}", f"params.how={how}",
                         f"params.place={place}", "export.folder=out")
    assert ended.code == 128 + signal.Signals[how], ended.err
    told = f"interrupted by {how}: stopped before anything was exported. The weights are in {trained_run}/checkpoint-5"
    assert ended.first_line.startswith(told), ended.err
    assert "Traceback" not in ended.err
    assert os.listdir(tmp_path / "out" / "serving") == [] if (tmp_path / "out").exists() else True
    assert ended.seconds < MOST_SECONDS and ended.steps() == [0, 5]


@pytest.mark.slow
def test_fault_24_a_second_signal_during_export_leaves_none_and_the_next_export_is_whole(
        commands, tmp_path, trained_run):
    arguments = ["quiet=true", "mode=export", NATIVE, f"model_dir={trained_run}", "export.folder=out"]
    ended = commands.run(tmp_path, *arguments, "params.how=twice", "params.place=export_files")
    assert ended.code == 143, ended.err
    assert ended.seconds < SECONDS_AT_ONCE, "from the second signal"
    assert visible(tmp_path / "out" / "serving") == []
    ended = commands.run(tmp_path, *arguments)
    assert ended.code == 0, ended.err
    base = tmp_path / "out" / "serving"
    assert ended.out.endswith(f"export: out/serving/{visible(base)[0]}\n") and os.listdir(base) == visible(base)
    assert load(base / visible(base)[0]).global_step == 5


WITH_EXPORTER = ["quiet=true", "mode=train_and_evaluate", "export.exporters=[latest]", "run.max_steps=40", NATIVE]


@pytest.mark.slow
@pytest.mark.parametrize(("place", "told"), [
    ("serving_input_fn", "in serving_input_fn at step 21: ZeroDivisionError: by the test"),
    ("export_trace", "in export at step 21: model_fn in mode PREDICT cannot be traced"),
    ("export_files", "in export at step 21: ZeroDivisionError: by the test")],
    ids=["serving_input_fn", "export_trace", "export_files"])
def test_fault_34_an_exporter_that_raises_ends_the_run_with_its_error_and_leaves_no_part_of_an_export(
        commands, tmp_path, place, told):
    ended = commands.run(tmp_path, *WITH_EXPORTER, f"params.place={place}", "params.how=raise")
    assert ended.code == 1
    assert ended.first_line.startswith(f"error: {told}") and "ZeroDivisionError: by the test" in ended.err
    assert f"The exporter 'latest' raised it, for {ended.model_dir.name}/checkpoint-20." in ended.first_line
    assert "(The same command goes on from step 20, in run.)" in ended.first_line
    assert ended.steps() == [0, 20]
    base = ended.model_dir / "export" / "latest"
    assert not base.exists() or os.listdir(base) == []
    ended = commands.run(tmp_path, *WITH_EXPORTER)
    assert (ended.code, ended.steps()) == (0, [0, 20, 40]), ended.err
    assert [load(base / name).global_step for name in os.listdir(base)] == [40]


def test_fault_34_an_exporter_of_the_users_own_that_raises_is_named(tmp_path):
    class Fails(tpuspec.Exporter):
        name = "mine"

        def export(self, trainer, export_path, checkpoint_path, eval_result, is_the_final_export):
            trainer.export(export_path, serving_input_fn, checkpoint_path)
            raise KeyError("behind its export")

    trainer = make_trainer(tmp_path, use_tpu=False, save_checkpoints_steps=2)
    with pytest.raises(KeyError, match="behind its export") as caught:
        tpuspec.train_and_evaluate(trainer, tpuspec.TrainSpec(rows_input(), 4),
                                   tpuspec.EvalSpec(rows_input(), steps=None, exporters=Fails(), throttle_secs=0))
    assert caught.value.__notes__ == [f"The exporter 'mine' raised it, for {tmp_path}/checkpoint-2."]
    assert caught.value._tpuspec_phase == "exporter mine"
    assert CheckpointStore(tmp_path).steps() == [0, 2] and damaged_steps(CheckpointStore(tmp_path)) == []
    base = tmp_path / "export" / "mine"
    assert [load(base / name).global_step for name in visible(base)] == [2]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["export", "export_trace", "export_files"])
def test_fault_22_a_signal_while_an_exporter_works_ends_at_a_finished_step_with_whole_exports_only(
        commands, tmp_path, place):
    ended = commands.run(tmp_path, *WITH_EXPORTER, f"params.place={place}", "params.how=SIGTERM")
    assert ended.code == 143
    assert ended.first_line.startswith("interrupted by SIGTERM: stopped at step 20, newest checkpoint"), ended.err
    assert ended.last_step() == 20
    base = ended.model_dir / "export" / "latest"
    assert os.listdir(base) == visible(base)
    assert all(load(base / name).global_step == 20 for name in visible(base))
    assert ended.seconds < MOST_SECONDS


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("run"), use_tpu=False).train(rows_input(), max_steps=2)


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """Commits a small export into a folder, and returns its name."""
    asset = tmp_path_factory.mktemp("assets") / "b"
    asset.write_text("x")
    weights = {"w": torch.full((1, 1), 2.0)}
    program = trace(lambda weights, x: {"serving_default": PredictOutput({"y": x @ weights["w"]})}, weights,
                    torch.ones(1, 1))

    def commit(base):
        base.mkdir(exist_ok=True)
        return commit_next(base, lambda folder: write_bundle(
            writing_into(folder), programs={CPU_TAGS: program}, weights=encode_tensors(weights), single_input=True,
            assets={"a/b": asset}, global_step=2, metrics={})).name

    return commit


@pytest.mark.parametrize("how", ["error", "no_space", "half", "kill"])
def test_fault_02_after_a_fault_at_any_call_an_export_is_whole_or_not_there(tmp_path, write, how):
    with system_calls(SystemCalls()) as calls:
        write(tmp_path / "counting")
    assert len(calls.made) >= 15
    seen = set()
    for number in range(len(calls.made)):
        base = tmp_path / f"at {number}"
        with system_calls(SystemCalls(number, how)):
            try:
                done = [write(base)]
            except Killed:
                done = visible(base)  # dead behind the rename: it is there
            except OSError:
                done = []
        assert visible(base) == done, number
        for name in done:
            assert load(base / name)(torch.ones(1, 1))["y"].item() == 2
        if how in ("error", "no_space"):
            assert sorted(os.listdir(base)) == done
        again = write(base)
        assert sorted(os.listdir(base)) == [*done, again], "the next one mends what was left"
        seen.add(len(done))
    assert seen == ({0, 1} if how in ("half", "kill") else {0})


def test_fault_09_an_export_that_cannot_be_written_says_where_and_how_large_it_is(tmp_path, trainer):
    with system_calls(SystemCalls(4, "no_space")), pytest.raises(
            ExportError, match=r"could not be written to .*, where nothing of it is left: .*Its weights have 8 bytes"):
        trainer.export(tmp_path, serving_input_fn)
    assert os.listdir(tmp_path) == []


def test_fault_05_retention_leaves_a_checkpoint_that_is_exported(tmp_path):
    trainer = make_trainer(tmp_path / "run", use_tpu=False, save_checkpoints_steps=1, keep_checkpoint_max=1)
    trainer.train(rows_input(), max_steps=1)
    seen = []

    def train_on_and_go():
        seen.append(trainer.latest_checkpoint())
        other = make_trainer(tmp_path / "run", use_tpu=False, save_checkpoints_steps=1, keep_checkpoint_max=1)
        seen.append(CheckpointStore(tmp_path / "run").steps())
        other.train(rows_input(), max_steps=3)
        seen.append(CheckpointStore(tmp_path / "run").steps())
        return serving_input_fn()

    fresh = make_trainer(tmp_path / "run", use_tpu=False)
    assert load(fresh.export(tmp_path / "out", train_on_and_go)).global_step == 1
    assert seen[1:] == [[1], [1, 3]], "kept while it was read; step 2 went"
    trainer.train(rows_input(), max_steps=4)
    assert CheckpointStore(tmp_path / "run").steps() == [4], "its turn came"


@pytest.mark.parametrize("place", ["../x", "/x", "a/../../x", "a//b", "x\0y", "-x", ".x", "", "a/", "x" * 300, 7])
def test_fault_49_an_asset_that_leaves_the_export_is_refused(tmp_path, trainer, place):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="assets_extra maps places below assets.extra"):
        trainer.export(tmp_path / "out", serving_input_fn, assets_extra={place: tmp_path / "file"})
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("base", ["x\0y", "x" * 300, "/dev/null/x", "memory://bucket/x"])
def test_fault_49_a_folder_that_cannot_be_is_refused_before_model_fn_runs(tmp_path, monkeypatch, trainer, base):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "_model_fn", None)
    with pytest.raises(ConfigError, match="export_dir_base must be a folder"):
        trainer.export(base, serving_input_fn)
    assert os.listdir(tmp_path) == []


def test_fault_49_54_a_folder_in_which_no_file_can_grow_is_refused_and_left_empty(tmp_path, trainer):
    says = r"must be a folder that can be written; .*File too large.* Raise the limit on the size of files, or take"
    with full_at(0), pytest.raises(ConfigError, match=says):
        trainer.export(tmp_path / "out", serving_input_fn)
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.hardware
def test_fault_49_54_a_folder_on_a_full_disk_is_refused_and_left_empty(tmp_path, trainer):
    with SmallDisk(tmp_path / "out", 64_000).mounted() as disk:
        disk.fill()
        with pytest.raises(ConfigError, match=r"No space left on device.* Make room, or take another one"):
            trainer.export(tmp_path / "out", serving_input_fn)
        assert os.listdir(tmp_path / "out") == ["filler"]
