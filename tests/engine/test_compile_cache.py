"""Where jax keeps compiled programs."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import pytest

import tpuspec
from tpuspec.engine.compile_cache import keep_programs

NAMES = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture(autouse=True)
def own_settings():
    """As in a process that has set no cache; gives its settings back."""
    before = {name: getattr(jax.config, name) for name in NAMES}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_default_is_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = keep_programs(tpuspec.RunConfig())
    assert folder == tmp_path / "tpuspec" / "xla" and folder.is_dir()
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert keep_programs(tpuspec.RunConfig()) == folder


def test_a_folder_of_the_users_is_taken_and_none_is_none(tmp_path):
    assert keep_programs(tpuspec.RunConfig(compile_cache=None)) is None
    assert keep_programs(tpuspec.RunConfig(compile_cache=str(tmp_path))) == tmp_path


def test_the_users_own_cache_of_jax_wins(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    assert keep_programs(tpuspec.RunConfig(compile_cache=str(tmp_path))) is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "theirs")


def test_a_folder_that_cannot_be_made_costs_the_cache_only(tmp_path, caplog):
    (tmp_path / "file").touch()
    assert keep_programs(tpuspec.RunConfig(compile_cache=str(tmp_path / "file" / "below"))) is None
    assert "there is no compile cache" in caplog.text


COUNTED = """
import runpy, sys
import jax.monitoring
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
try:
    runpy.run_module("tpuspec.train", run_name="__main__", alter_sys=True)
finally:
    print("hits:", len(hits))
"""


@pytest.mark.slow
def test_a_second_run_finds_the_programs_of_the_first(tmp_path):
    hits = []
    for number in range(2):
        done = subprocess.run(
            [sys.executable, "-c", COUNTED, "config=digits", "mode=train", "run.max_steps=12", "quiet=true",
             f"run.compile_cache={tmp_path / 'cache'}", f"model_dir={tmp_path / str(number)}"],
            check=True, timeout=240, env={**os.environ, "PJRT_DEVICE": "CPU"}, capture_output=True, text=True)
        hits.append(int(done.stdout.rpartition("hits: ")[2]))
    assert hits[0] == 0 < hits[1]
