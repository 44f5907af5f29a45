"""The command with the real Trainer, in an empty folder: on XLA in a process of its own, without XLA in this one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tpuspec import train

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 240


def run(folder, *arguments):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return subprocess.run(
        [sys.executable, "-m", "tpuspec.train", *arguments], cwd=folder, capture_output=True, text=True,
        timeout=TIMEOUT_SECONDS, env={**os.environ, "PYTHONPATH": path})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of 20 steps in out/, and how that command ended."""
    folder = tmp_path_factory.mktemp("empty folder")
    return folder, run(folder, "config=digits", "run.max_steps=20", "params.learning_rate=0.003", "model_dir=out")


@pytest.mark.slow
def test_training_prints_the_score_and_leaves_files_in_model_dir_only(trained):
    folder, ended = trained
    assert ended.returncode == 0, ended.stderr
    *_, score, tensorboard = ended.stdout.splitlines()
    assert score.startswith("evaluation at step 20: accuracy 0.")
    assert tensorboard == "TensorBoard: tensorboard --logdir out"
    assert [path.name for path in folder.iterdir()] == ["out"]
    assert {"config.yaml", "environment.json"} <= {path.name for path in (folder / "out").iterdir()}


@pytest.mark.slow
def test_second_run_says_that_training_is_complete_and_scores_the_same(trained):
    folder, first = trained
    ended = run(folder, "config=digits", "run.max_steps=20", "model_dir=out", "quiet=true")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[0].startswith("training is complete: out is at step 20")
    assert ended.stdout.splitlines()[-2:] == first.stdout.splitlines()[-2:]


@pytest.mark.slow
def test_predictions_without_xla_agree_with_the_accuracy_on_it(trained, monkeypatch):
    from tpuspec.recipes import digits

    folder, first = trained
    monkeypatch.chdir(folder)
    assert train.main(["config=digits", "mode=predict", "model_dir=out", "use_tpu=false"]) == 0
    lines = (folder / "out" / "predictions.jsonl").read_text().splitlines()
    classes = [json.loads(line)["classes"] for line in lines]
    labels = digits.load_split("infer")[1].tolist()
    share = sum(a == b for a, b in zip(classes, labels, strict=True)) / len(labels)
    assert f"accuracy {share:.6g}," in first.stdout


def test_no_config_is_a_usage_error_that_imports_no_torch_xla(tmp_path):
    code = "import sys; from tpuspec import train; print(train.main([]), 'torch_xla' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                           timeout=TIMEOUT_SECONDS, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (ended.returncode, ended.stdout) == (0, "2 False\n"), ended.stderr
    assert re.search("config=digits +Handwritten digits", ended.stderr)
    assert list(tmp_path.iterdir()) == []


def test_sweep_trains_each_job_without_xla(folder, capsys):
    assert train.main(["-m", "config=digits", "params.width=2,4", "run.max_steps=2", "use_tpu=false",
                       "model_dir=s"]) == 0
    assert sorted(path.name for path in (folder / "s").iterdir()) == ["0_params.width=2", "1_params.width=4"]
    assert capsys.readouterr().out.splitlines()[-2].startswith("1_params.width=4  accuracy 0.")


def test_error_of_user_code_keeps_its_traceback_and_is_the_last_line(folder, capsys, monkeypatch):
    (folder / "theirs.py").write_text("def input_fn(params, mode):\n    raise KeyError('their own mistake')\n")
    monkeypatch.syspath_prepend(folder)
    assert train.main(["config=digits", "input_fn=theirs.input_fn", "allow=[theirs.]", "use_tpu=false"]) == 1
    error = capsys.readouterr().err
    assert 'theirs.py", line 2, in input_fn' in error
    assert error.splitlines()[-1] == "KeyError: 'their own mistake'"
    del sys.modules["theirs"]


def test_value_that_the_trainer_refuses_leaves_nothing(folder, capsys):
    assert train.main(["config=digits", "train_batch_size=-1"]) == 2
    assert capsys.readouterr().err == "error: train_batch_size must be positive; got -1.\n"
    assert list(folder.iterdir()) == []
