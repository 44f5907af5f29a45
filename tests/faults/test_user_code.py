"""User code that fails ends the command with its own error, named in the first line, and leaves whole checkpoints."""

from __future__ import annotations

import re

import pytest

import tpuspec
from tests.checkpoints import damaged_steps
from tests.faults import faulty
from tests.faults.commands import CONFIG
from tests.regression import make_trainer, rows_input
from tpuspec import train
from tpuspec.checkpoint.store import CheckpointStore

both = pytest.mark.parametrize("use_tpu", ["true", "false"])


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs `config=faulty` in this process; returns exit code, first line and all of standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(faulty, "num_traces", 0)
    monkeypatch.setattr(faulty, "num_evaluated", 0)

    def run(*arguments):
        code = train.main([*CONFIG, "model_dir=run", "quiet=true", "run.max_steps=40", *arguments])
        err = capsys.readouterr().err
        return code, (err.splitlines() or [""])[0], err

    return run


def steps():
    store = CheckpointStore("run")
    assert damaged_steps(store) == []
    return store.steps()


WAY_ON = r" \(The same command goes on from step (0|20|40), in run\.\)"


@both
@pytest.mark.parametrize(("arguments", "first_line"), [
    (["params.place=input_fn"], r"error: in input_fn at step [3-5]: ZeroDivisionError: by the test"),
    (["params.place=model_fn"], r"error: in model_fn at step [12]: ZeroDivisionError: by the test"),
    (["params.place=host_call"],
     r"error: host_call raised ZeroDivisionError at step 5 \(global_step 4 before its update\): by the test"),
    (["params.place=host_call", "params.step=40"],
     r"error: host_call raised ZeroDivisionError at step 40 .*by the test"),
    (["params.place=host_call", "params.step=30", "run.host_queue_size=1"],
     r"error: host_call raised ZeroDivisionError at step 30 .*by the test"),
    (["params.place=metric_fn"],
     r"error: (in )?metric_fn (raised ZeroDivisionError )?at step [345]: (ZeroDivisionError: )?by the test"),
], ids=["fault_28_input_fn", "fault_30_model_fn", "fault_32_host_call", "fault_32_host_call_of_the_last_step",
        "fault_32_host_call_behind_a_full_queue", "fault_31_metric_fn"])
def test_an_error_is_named_with_its_place_and_step(command, arguments, first_line, use_tpu):
    code, line, err = command(f"use_tpu={use_tpu}", *arguments)
    assert code == 1
    assert re.fullmatch(first_line + WAY_ON, line), err
    assert 'faulty.py", line' in err, "the user's own traceback"
    assert steps()


@both
@pytest.mark.parametrize("place", ["input_fn", "model_fn", "host_call", "metric_fn"])
def test_fault_35_an_exit_of_user_code_is_not_swallowed(command, place, use_tpu):
    with pytest.raises(SystemExit, match="7"):
        command(f"params.place={place}", "params.how=exit", f"use_tpu={use_tpu}")
    assert steps()


@both
def test_fault_35_an_error_that_cannot_be_pickled_is_not_swallowed(command, use_tpu):
    code, line, _ = command("params.place=host_call", "params.how=unpicklable", f"use_tpu={use_tpu}")
    assert (code, "host_call raised Local at step 5" in line) == (1, True)


@pytest.mark.slow
def test_fault_35_an_error_of_a_worker_that_cannot_be_pickled_is_not_swallowed(commands, tmp_path):
    ended = commands.run(tmp_path, "quiet=true", "mode=train", "use_tpu=false", "params.place=input_fn",
                         "params.how=unpicklable", "params.num_workers=1")
    assert ended.code == 1
    assert "in input_fn at step 4: a worker process of the DataLoader died: " in ended.first_line
    assert "Local: by the test" in ended.err, "its own traceback"


@both
def test_fault_36_a_loss_of_nan_names_its_step_and_keeps_the_last_finite_checkpoint(command, use_tpu):
    code, line, _ = command("params.how=not_a_number", "params.step=25", "run.save_checkpoints_steps=10",
                            "run.keep_checkpoint_max=1", f"use_tpu={use_tpu}")
    assert code == 1
    assert "The loss of step 25 is nan" in line
    assert steps() == [20]


@both
@pytest.mark.parametrize("place", ["input_fn", "host_call"])
def test_fault_38_full_memory_suggests_a_batch_size(command, place, use_tpu):
    code, line, _ = command(f"params.place={place}", "params.how=memory", f"use_tpu={use_tpu}")
    assert code == 1
    assert "The memory is full: lower train_batch_size=4, to 2 for example" in line


@pytest.mark.parametrize("method", ["begin", "before_run", "after_run", "end"])
def test_fault_33_a_hook_that_raises_ends_the_run_and_the_other_hooks_end_is_called(tmp_path, method):
    ends = []

    class Fails(tpuspec.SessionRunHook):
        pass

    def fail(self, context):
        raise ZeroDivisionError("the first")

    setattr(Fails, method, fail)

    class Other(tpuspec.SessionRunHook):
        def end(self, context):
            ends.append(context.step)
            raise ValueError("a second one, which is only told of")

    with pytest.raises(ZeroDivisionError, match="the first") as caught:
        make_trainer(tmp_path, save_checkpoints_steps=2).train(rows_input(), hooks=[Fails(), Other()], max_steps=4)
    assert len(ends) == (method != "begin")
    assert caught.value._tpuspec_phase == f"Fails.{method}"
    assert damaged_steps(CheckpointStore(tmp_path)) == []
