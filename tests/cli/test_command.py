"""The command as people run it: a process of its own, in an empty folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_training_prints_the_score_and_leaves_files_in_model_dir_only(trained):
    folder, ended = trained
    assert ended.returncode == 0, ended.stderr
    *_, score, tensorboard = ended.stdout.splitlines()
    assert score.startswith("evaluation at step 20: accuracy 0.")
    assert tensorboard == "TensorBoard: tensorboard --logdir out"
    assert [path.name for path in folder.iterdir()] == ["out"]
    assert {"config.yaml", "environment.json"} <= {path.name for path in (folder / "out").iterdir()}


def test_second_run_says_that_training_is_complete_and_scores_the_same(trained):
    folder, first = trained
    ended = run(folder, "config=digits", "run.max_steps=20", "model_dir=out", "quiet=true")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[0].startswith("training is complete: out is at step 20")
    assert ended.stdout.splitlines()[-2:] == first.stdout.splitlines()[-2:]


def test_predictions_agree_with_the_accuracy(trained):
    from recipes import digits

    folder, first = trained
    ended = run(folder, "config=digits", "mode=predict", "model_dir=out")
    assert ended.returncode == 0, ended.stderr
    lines = (folder / "out" / "predictions.jsonl").read_text().splitlines()
    classes = [json.loads(line)["classes"] for line in lines]
    labels = digits.load_split("infer")[1].tolist()
    share = sum(a == b for a, b in zip(classes, labels, strict=True)) / len(labels)
    assert f"accuracy {share:.6g}," in first.stdout


def test_sweep_trains_each_job_without_xla(tmp_path):
    ended = run(tmp_path, "-m", "config=digits", "params.width=2,4", "run.max_steps=2", "use_tpu=false", "model_dir=s")
    assert ended.returncode == 0, ended.stderr
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == ["0_params.width=2", "1_params.width=4"]


def test_error_of_user_code_keeps_its_traceback_and_is_the_last_line(tmp_path):
    (tmp_path / "theirs.py").write_text("def input_fn(params, mode):\n    raise KeyError('their own mistake')\n")
    ended = run(tmp_path, "config=digits", "input_fn=theirs.input_fn", "allow=[theirs.]", "use_tpu=false")
    assert ended.returncode == 1
    assert 'theirs.py", line 2, in input_fn' in ended.stderr
    assert ended.stderr.splitlines()[-1] == "KeyError: 'their own mistake'"


def test_no_config_is_a_usage_error_without_a_device(tmp_path):
    ended = run(tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "config=digits  Handwritten digits" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_imports_no_torch_xla(tmp_path):
    code = ("import sys; from tpuspec import train; code = train.main(['--help']); "
            "assert 'torch_xla' not in sys.modules; sys.exit(code)")
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                           timeout=TIMEOUT_SECONDS, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert ended.returncode == 0, ended.stderr
