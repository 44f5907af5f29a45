import logging
import os
import subprocess
import sys

import pytest
import torch_xla.runtime as xr

import tpuspec
from tpuspec.errors import ConfigError
from tpuspec.runtime import compile_cache
from tpuspec.runtime.compile_cache import initialize_compile_cache


@pytest.fixture
def initialized(monkeypatch):
    """Folders given to XLA; as in a process that has not computed yet."""
    folders = []
    monkeypatch.setattr(xr, "initialize_cache", folders.append)
    monkeypatch.setattr("torch_xla._XLAC._xla_computation_cache_is_initialized", lambda: False)
    monkeypatch.delenv(compile_cache.PATH_VARIABLE, raising=False)
    return folders


def test_the_default_is_in_the_users_cache_folder_and_each_process_has_its_own(initialized, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = initialize_compile_cache(tpuspec.RunConfig(), "TPU")
    assert folder == tmp_path / "tpuspec" / "xla" / "process0" and folder.is_dir()
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert initialize_compile_cache(tpuspec.RunConfig(), "TPU") == folder.parent / "process3"
    assert initialized == [str(folder), str(folder.parent / "process3")]


def test_a_folder_of_the_users_is_taken_and_none_is_none(initialized, tmp_path):
    assert initialize_compile_cache(tpuspec.RunConfig(compile_cache=str(tmp_path)), "TPU") == tmp_path / "process0"
    assert initialize_compile_cache(tpuspec.RunConfig(compile_cache=None), "TPU") is None
    assert len(initialized) == 1


def test_the_variable_of_xla_wins(initialized, monkeypatch, tmp_path):
    monkeypatch.setenv(compile_cache.PATH_VARIABLE, str(tmp_path / "theirs"))
    assert initialize_compile_cache(tpuspec.RunConfig(compile_cache=str(tmp_path)), "TPU") is None
    assert initialized == []


def test_a_folder_that_cannot_be_made_costs_the_cache_only(initialized, tmp_path, caplog):
    (tmp_path / "file").touch()
    assert initialize_compile_cache(tpuspec.RunConfig(compile_cache=str(tmp_path / "file")), "TPU") is None
    assert "there is no compile cache" in caplog.text and initialized == []


def test_a_process_that_has_computed_is_told_that_it_is_too_late(initialized, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr("torch_xla._XLAC._xla_computation_cache_is_initialized", lambda: True)
    assert initialize_compile_cache(tpuspec.RunConfig(compile_cache=str(tmp_path)), "TPU") is None
    assert "has run an XLA computation before" in caplog.text


def test_xla_cpu_goes_without_and_says_so_where_a_folder_was_asked_for(initialized, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert initialize_compile_cache(tpuspec.RunConfig(), "CPU") is None
        assert caplog.records == []
        assert initialize_compile_cache(tpuspec.RunConfig(compile_cache=str(tmp_path)), "CPU") is None
    assert "has no effect on XLA:CPU" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_xla_cpu_cannot_read_programs_back(tmp_path):
    """Once it can, leave it out of _CANNOT_READ_BACK."""
    code = ("import sys, torch, torch_xla, torch_xla.runtime as xr, torch_xla.debug.metrics as met\n"
            "xr.initialize_cache(sys.argv[1])\n"
            "(torch.ones(3, device=torch_xla.device()) * 2).cpu()\n"
            "print([name for name in met.counter_names() if 'PersistentCache' in name])")
    environment = {**os.environ, "PJRT_DEVICE": "CPU"}
    runs = [subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True,
                           env=environment).stdout.strip() for _ in range(2)]
    assert runs == ["['PersistentCacheMiss']", "['PersistentCacheDeserializeFailure']"]


@pytest.mark.parametrize("value", ["", 3, True])
def test_compile_cache_is_a_folder_or_none(value):
    with pytest.raises(ConfigError, match="compile_cache must be a folder, 'default', or None"):
        tpuspec.RunConfig(compile_cache=value)
