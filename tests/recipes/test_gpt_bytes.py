import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tpuspec import ModeKeys
from tpuspec.recipes import gpt_bytes

ROOT = Path(__file__).resolve().parent.parent.parent
PARAMS = {
    "folder": None, "length": 8, "width": 8, "num_layers": 1, "num_heads": 2, "dropout": 0.0, "learning_rate": 0.01,
    "weight_decay": 0.1, "clip_grad_norm": 1.0, "warm_up_steps": 4, "schedule_steps": 20, "eval_windows": 5,
    "num_samples": 2, "sample_bytes": 3, "temperature": 1.0, "batch_size": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("library")
    for i in range(40):
        (folder / f"module{i}.py").write_text(f"def f{i}():\n    return {i}\n" * 5)
    for left_out in ("test", "site-packages"):
        (folder / left_out).mkdir()
        (folder / left_out / "other.py").write_text("secret = 1\n")
    return folder


def test_files_are_split_whole_and_tests_and_installed_packages_are_left_out(folder):
    texts = {mode: gpt_bytes.load_bytes(str(folder), mode).tobytes() for mode in (ModeKeys.TRAIN, ModeKeys.EVAL)}
    files = {mode: text.split(b"\0")[:-1] for mode, text in texts.items()}
    assert sorted(files[ModeKeys.TRAIN] + files[ModeKeys.EVAL]) == sorted(
        path.read_bytes() for path in folder.glob("*.py"))
    assert 0 < len(files[ModeKeys.EVAL]) < len(files[ModeKeys.TRAIN])
    assert b"secret" not in texts[ModeKeys.TRAIN] + texts[ModeKeys.EVAL]


def test_the_standard_library_is_enough_text_for_both():
    sizes = {mode: len(gpt_bytes.load_bytes(None, mode)) for mode in (ModeKeys.TRAIN, ModeKeys.EVAL)}
    assert sizes[ModeKeys.TRAIN] > 4e6 and 3 < sizes[ModeKeys.TRAIN] / sizes[ModeKeys.EVAL] < 30


def test_a_folder_without_source_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="params.folder=DIR"):
        gpt_bytes.load_bytes(str(tmp_path), ModeKeys.TRAIN)


def test_labels_are_the_bytes_behind_and_windows_do_not_overlap():
    windows = gpt_bytes.Windows(np.arange(33, dtype=np.uint8), 8)
    assert [x.tolist() for x, _ in windows] == [list(range(i, i + 8)) for i in (0, 8, 16, 24)]
    assert all(torch.equal(y, x + 1) and y.dtype == torch.int64 for x, y in windows)
    with pytest.raises(ValueError, match="less than one window"):
        gpt_bytes.Windows(np.zeros(8, dtype=np.uint8), 8)


def test_evaluation_windows_spread_over_the_whole_text():
    windows = gpt_bytes.Windows(np.zeros(8 * 100 + 1, dtype=np.uint8), 8, num_windows=5)
    assert windows._starts[[0, -1]].tolist() == [0, 792] and len(windows) == 5


def test_no_position_sees_what_comes_behind_it():
    torch.manual_seed(0)
    model = gpt_bytes.model(PARAMS)
    x = torch.randint(0, 256, (1, 8))
    changed = x.clone()
    changed[0, 5] += 1
    difference = (model(x) - model(changed)).abs().amax(dim=-1)[0]
    assert (difference[:5] == 0).all() and difference[5] > 0


def test_rate_warms_up_then_falls_to_a_tenth_and_stays():
    model = gpt_bytes.model(PARAMS)
    optimizer = gpt_bytes.optimizer(model, PARAMS)
    schedule, rates = gpt_bytes.scheduler(optimizer, PARAMS), []
    for _ in range(25):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01])
    assert rates[4:21] == sorted(rates[4:21], reverse=True)
    assert rates[20:] == pytest.approx([0.001] * 5)


def test_only_matrices_decay():
    model = gpt_bytes.model(PARAMS)
    decaying, others = gpt_bytes.optimizer(model, PARAMS).param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim > 1 for p in decaying["params"]) and all(p.ndim == 1 for p in others["params"])
    assert len(decaying["params"]) + len(others["params"]) == len(list(model.parameters()))


def make_spec(mode, features, labels, model=None):
    model = model or gpt_bytes.model(PARAMS)
    return gpt_bytes.model_fn(
        features=features, labels=labels, mode=mode, params=PARAMS, model=model, global_step=torch.tensor([4]),
        optimizer=gpt_bytes.optimizer(model, PARAMS) if mode == ModeKeys.TRAIN else None)


def test_an_untrained_model_needs_eight_bits_a_byte():
    torch.manual_seed(0)
    spec = make_spec(ModeKeys.EVAL, torch.randint(0, 256, (6, 8)), torch.randint(0, 256, (6, 8)))
    metric_fn, tensors = spec.eval_metrics
    assert metric_fn(*tensors)["bits_per_byte"].mean().item() == pytest.approx(8, abs=0.2)
    assert spec.loss.shape == (6,) and spec.loss.mean().item() == pytest.approx(8 * math.log(2), abs=0.15)


def test_train_spec_clips_and_reports_the_rate():
    spec = make_spec(ModeKeys.TRAIN, torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.int64))
    assert spec.train_op.clip_grad_norm == 1.0
    assert spec.host_call[1][2].tolist() == pytest.approx([0.01])


def test_each_sampling_step_appends_the_byte_that_was_drawn():
    torch.manual_seed(0)
    model = gpt_bytes.model(PARAMS).eval()
    drawn = []
    with torch.no_grad():
        for features in gpt_bytes.input_fn(PARAMS, ModeKeys.PREDICT):
            drawn.append(make_spec(ModeKeys.PREDICT, features, None, model).predictions["byte"])
    assert len(drawn) == 3
    start = list(b"\n\n\n\ndef ")
    for i in range(2):
        assert model.window[i].tolist() == start[3:] + [int(step[i]) for step in drawn]


def test_a_cold_temperature_draws_the_likeliest_byte_and_a_new_start_forgets_the_last():
    torch.manual_seed(0)
    model = gpt_bytes.model(PARAMS).eval()
    prompt = torch.randint(0, 256, (2, 8))
    with torch.no_grad():
        expected = model(prompt)[:, -1].argmax(dim=-1)
        for _ in range(3):
            assert torch.equal(gpt_bytes.sample(model, prompt, torch.tensor([True, True]), 1e-6), expected)


@pytest.mark.slow
def test_the_command_learns_and_prints_a_sample(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tpuspec.train", "config=gpt_bytes", "run.max_steps=60", "params.eval_windows=128",
         "params.width=32", "params.num_layers=2", "params.sample_bytes=40", f"model_dir={tmp_path}"],
        cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    bits = float(re.search(r"evaluation at step 60: bits_per_byte ([\d.]+)", done.stdout)[1])
    assert bits < 6
    assert re.search(r"a sample at step 60:\ndef .", done.stdout)
