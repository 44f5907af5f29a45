"""Choosing a platform and starting its client; each case in a process of its own, as the client starts once."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tpuspec.config import CaptureMode, RunConfig
from tpuspec.errors import ConfigError, DeviceError
from tpuspec.native.backend import NativeBackend
from tpuspec.select import select


def run_python(code: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=240)


SELECT = """
import tpuspec
from tpuspec.select import select
backend = select(tpuspec.RunConfig(tpu_config=tpuspec.TPUConfig(num_shards={num_shards})), use_tpu=True)
print(backend.topology)
"""


@pytest.mark.slow
def test_without_pjrt_device_and_without_tpu_the_cpu_is_chosen_and_the_reason_told():
    done = run_python(SELECT.format(num_shards=None), PJRT_DEVICE=None)
    assert done.returncode == 0, done.stderr
    assert "platform='CPU'" in done.stdout and "PJRT_DEVICE not set, no TPU found" in done.stdout
    assert "Defaulting to PJRT_DEVICE" not in done.stderr


@pytest.mark.slow
def test_a_platform_that_cannot_start_is_a_device_error_with_the_mend():
    done = run_python(SELECT.format(num_shards=None), PJRT_DEVICE="NOSUCH")
    assert done.returncode == 1
    assert "DeviceError: PJRT_DEVICE=NOSUCH cannot be started" in done.stderr
    assert "Set PJRT_DEVICE=CPU" in done.stderr


@pytest.mark.slow
def test_a_client_of_torch_xla_that_runs_is_enough_to_trace_with():
    done = run_python("import torch_xla; torch_xla.device()" + SELECT.format(num_shards=4), PJRT_DEVICE="CPU",
                      CPU_NUM_DEVICES=None)
    assert done.returncode == 1 and "before the first XLA call" in done.stderr
    done = run_python("import torch_xla; torch_xla.device()" + SELECT.format(num_shards=4), PJRT_DEVICE="CPU",
                      CPU_NUM_DEVICES="4")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_client_of_jax_that_runs_with_fewer_devices_is_told():
    done = run_python("import jax; jax.devices()" + SELECT.format(num_shards=4), PJRT_DEVICE="CPU")
    assert "ConfigError: TPUConfig.num_shards is not set correctly, it should be (1), got (4)" in done.stderr
    assert "set CPU_NUM_DEVICES=4 before the first XLA call" in done.stderr


def test_without_torch_xla_the_error_says_what_to_install():
    hide = ("import importlib.util as u; real = u.find_spec\n"
            "u.find_spec = lambda name, *a: None if name == 'torch_xla' else real(name, *a)")
    done = run_python(hide + SELECT.format(num_shards=1), PJRT_DEVICE="CPU")
    assert "DeviceError: use_tpu=True needs torch_xla, which is not installed" in done.stderr
    assert "use_tpu=False" in done.stderr


def test_plain_pytorch_needs_no_xla():
    assert isinstance(select(RunConfig(), use_tpu=False), NativeBackend)


def test_several_processes_need_the_address_of_the_first(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ConfigError, match="WORLD_SIZE=2 are set, and MASTER_PORT not.*torchrun sets all four"):
        select(RunConfig(), use_tpu=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told():
    with pytest.raises(DeviceError, match="number 0, and torch .* finds 0 GPUs"):
        select(RunConfig(device="cuda"), use_tpu=False)


def test_required_capture_is_refused_where_nothing_is_captured():
    with pytest.raises(ConfigError, match=r"capture=require.*Set capture=auto"):
        select(RunConfig(capture=CaptureMode.require), use_tpu=False)


@pytest.mark.slow
def test_a_tpu_that_is_not_there_is_told_in_one_line_by_the_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tpuspec.train", "config=digits", "run.max_steps=2", f"model_dir={tmp_path}"],
        env={**os.environ, "PJRT_DEVICE": "TPU"}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: PJRT_DEVICE=TPU cannot be started: ")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_small_letters_name_a_platform_too():
    done = run_python(SELECT.format(num_shards=None), PJRT_DEVICE="cpu")
    assert done.returncode == 0, done.stderr
    assert "platform='CPU'" in done.stdout
