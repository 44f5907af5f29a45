"""Checkpoints at an address of fsspec: the same promises as in a local folder, without a rename."""

from __future__ import annotations

import itertools
import json
import time

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from tests.checkpoints import newest_value, state_of
from tests.remote_folders import Stopped, dying_at
from tpuspec.checkpoint.__main__ import main
from tpuspec.checkpoint.manager import CheckpointManager
from tpuspec.checkpoint.policy import RetentionPolicy, SavePolicy
from tpuspec.checkpoint.remote import LEASE_SECONDS
from tpuspec.checkpoint.store import CheckpointStore
from tpuspec.errors import CheckpointError, ConfigError
from tpuspec.files.disk import InUseError
from tpuspec.files.location import resolve
from tpuspec.files.remote_lock import STALE_SECONDS

_numbers = itertools.count()


@pytest.fixture(params=["memory", "disk"])
def address(request, tmp_path):
    return f"memory://test/{next(_numbers)}" if request.param == "memory" else f"disk://{tmp_path}/run"


def _save(address: str, step: int, value: float = 1.0, *, keep: int | None = None, **options) -> CheckpointStore:
    store = CheckpointStore(address, sleep=lambda seconds: None, **options)
    store.prepare()
    CheckpointManager(store, SavePolicy(1, None), RetentionPolicy(max_to_keep=keep)).save(state_of(step, value))
    return store


def _names(address: str) -> list[str]:
    fs, path = fsspec.url_to_fs(address)
    return sorted(name.removeprefix(path).lstrip("/") for name in fs.find(path))


def test_a_state_comes_back(address):
    store = _save(address, 5)
    assert store.path(5) == f"{address}/checkpoint-5" == store.latest()
    got = CheckpointStore(address).load(store.path(5))
    assert got.global_step == 5
    assert torch.equal(got.model["w"], torch.ones(3))
    assert store.steps() == [5]
    assert CheckpointStore(f"{address}/none").steps() == []


def test_retention_deletes_and_leaves_no_files(address):
    for step in range(4):
        _save(address, step, keep=2)
    assert CheckpointStore(address).steps() == [2, 3]
    assert {name.partition("/")[0] for name in _names(address)} == {"checkpoint-2", "checkpoint-3"}


def test_a_step_that_is_saved_again_is_another_generation(address):
    _save(address, 1, 1.0)
    store = CheckpointStore(address)
    with store.reading(store.path(1)):
        _save(address, 1, 2.0)
        assert "checkpoint-1/manifest.json" in _names(address), "the first is being read"
    assert newest_value(address) == 2.0
    assert _names(address) == [f"checkpoint-1/1-{name}" for name in (
        "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")]
    _save(address, 1, 3.0)
    assert newest_value(address) == 3.0


@pytest.mark.parametrize(("step", "keep"), [(2, None), (1, None), (2, 1)], ids=["new", "again", "with_retention"])
def test_fault_02_04_13_after_a_death_at_any_change_the_old_or_the_new_is_whole(monkeypatch, step, keep):
    def prepared():
        address = f"memory://test/{next(_numbers)}"
        _save(address, 1, 1.0)
        return address

    with dying_at(monkeypatch, MemoryFileSystem, None) as made:
        address = prepared()
        made.clear()
        _save(address, step, 2.0, keep=keep)
        num_changes = len(made)
    assert newest_value(address) == 2.0
    assert num_changes > 4
    seen = set()
    for number in range(num_changes):
        address = prepared()
        with dying_at(monkeypatch, MemoryFileSystem, number), pytest.raises(Stopped, match="^$"):
            _save(address, step, 2.0, keep=keep)
        store = CheckpointStore(address)
        assert store.load(store.latest()).model["w"][0] in (1.0, 2.0), "a reader's look, which mends nothing"
        # When the leases of the dead have ended, prepare deletes what they left.
        seen.add(newest_value(address, clock=lambda: time.time() + 2 * LEASE_SECONDS))
        assert len(_names(address)) == 4 * len(store.steps())
    # The manifest is the last change of a save that has nothing to delete.
    assert seen == ({1.0} if step == 2 and keep is None else {1.0, 2.0})


def test_fault_02_a_manifest_that_was_cut_off_counts_not(address):
    _save(address, 1, 1.0)
    _save(address, 2, 2.0)
    fs, path = fsspec.url_to_fs(address)
    manifest = f"{path}/checkpoint-2/manifest.json"
    fs.pipe_file(manifest, fs.cat_file(manifest)[:-10])
    assert newest_value(address) == 1.0


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_fault_14_damage_is_found_and_passed_over(address, name, caplog):
    _save(address, 1, 1.0)
    _save(address, 2, 2.0)
    fs, path = fsspec.url_to_fs(address)
    file = f"{path}/checkpoint-2/{name}"
    content = bytearray(fs.cat_file(file))
    content[len(content) // 2] ^= 1
    fs.pipe_file(file, bytes(content))
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        CheckpointStore(address).load(f"{address}/checkpoint-2")
    assert newest_value(address) == 1.0
    assert "Falling back to the checkpoint before it" in caplog.text
    assert main(["verify", address]) == 3


def test_fault_04_what_is_read_is_not_deleted_until_its_lease_ends(address):
    now = [1000.0]
    _save(address, 1, 1.0)
    store = CheckpointStore(address, clock=lambda: now[0])
    fs, path = fsspec.url_to_fs(address)
    lease = f"{path}/checkpoint-1/.reader-{int(now[0] + LEASE_SECONDS)}-0123456789abcdef"
    fs.pipe_file(lease, b"")
    with pytest.raises(InUseError, match="checkpoint-1 is in use"):
        store.delete(1)
    assert store.steps() == [1]
    now[0] += LEASE_SECONDS + 1  # its reader died
    store.delete(1)
    assert _names(address) == []


def test_fault_04_a_reader_whose_manifest_stands_keeps_the_files_though_a_deletion_began(monkeypatch):
    address = f"memory://test/{next(_numbers)}"
    store = _save(address, 1, 1.0)
    real = MemoryFileSystem.rm_file
    opened = []

    def rm_file(self, path):
        if path.endswith("manifest.json") and not opened:
            reader = store.reading(store.path(1))
            reader.__enter__()
            opened.append(reader)
        return real(self, path)

    monkeypatch.setattr(MemoryFileSystem, "rm_file", rm_file)
    store.delete(1)
    assert "checkpoint-1/model.safetensors" in _names(address)
    opened[0].__exit__(None, None, None)
    store.prepare()
    assert _names(address) == []


def test_fault_51_the_second_writer_is_told_who_holds_the_address(address):
    with CheckpointStore(address, clock=lambda: 100.0).writing():
        other = CheckpointStore(address, clock=lambda: 160.0)
        with pytest.raises(CheckpointError, match=r"process \d+ on host .*, for 60 s, does.*forgotten after 120 s"), \
                other.writing():
            pass
    with other.writing():
        pass
    assert _names(address) == []


@pytest.mark.parametrize("note", [
    {"host": "elsewhere", "pid": 1, "renewed_seconds": 1000.0 - STALE_SECONDS - 1},
    {"host": None, "pid": 2**22 - 1, "renewed_seconds": 999.0},  # of this machine, and gone
    {"host": None, "pid": 1, "process_began": 3.0, "renewed_seconds": 999.0},  # another process has its number now
], ids=["silent", "gone", "another"])
def test_fault_51_the_lock_of_a_dead_writer_is_taken(address, note, caplog, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    fs, path = fsspec.url_to_fs(address)
    fs.makedirs(path)
    fs.pipe_file(f"{path}/.writer.json", json.dumps(note | {"host": note["host"] or "here"}).encode())
    with CheckpointStore(address, clock=lambda: 1000.0).writing():
        assert "was left behind by process" in caplog.text


def test_fault_51_a_writer_that_lost_its_lock_commits_nothing(address):
    store = CheckpointStore(address, sleep=lambda seconds: None)
    fs, path = fsspec.url_to_fs(address)
    with store.writing():
        fs.pipe_file(f"{path}/.writer.json", json.dumps({"host": "elsewhere", "pid": 7, "token": "x"}).encode())
        with pytest.raises(CheckpointError, match="process 7 on host elsewhere, .* has taken the lock of model_dir"):
            store.save(state_of(1))
        assert store.steps() == []
    assert ".writer.json" in _names(address), "it is another's"


def test_an_error_of_the_client_is_a_checkpoint_error(monkeypatch, address):
    store = _save(address, 1)
    fs, _ = fsspec.url_to_fs(address)

    def fail(*args, **kwargs):
        raise RuntimeError("403 Forbidden")

    with monkeypatch.context() as patch:
        patch.setattr(type(fs), "open", fail)
        with pytest.raises(CheckpointError, match="checkpoint-2 could not be written .*RuntimeError: 403 Forbidden"):
            store.save(state_of(2))
    with monkeypatch.context() as patch:
        patch.setattr(type(fs), "pipe_file", fail)
        assert store.load(store.path(1)).global_step == 1, "a reader needs no right to write"
        with pytest.raises(ConfigError, match="model_dir must be a folder that can be written; .*403"):
            store.prepare()


def test_the_command_line_works_on_addresses(address, capsys):
    _save(address, 7)
    for command, expected in (("list", "step          7"), ("verify", "whole"), ("show", "w  float32 [3]")):
        for path in (address, f"{address}/checkpoint-7"):
            assert main([command, path]) == 0
            assert expected in capsys.readouterr().out
    assert main(["list", "nosuch://x"]) == 2
    assert main(["list", f"{address}/checkpoint-8"]) == 3


def test_file_addresses_are_local_folders(tmp_path):
    assert resolve(f"file://{tmp_path}/a b") == tmp_path / "a b"
    assert CheckpointStore(f"file://{tmp_path}/run").path(3) == tmp_path / "run" / "checkpoint-3"


def test_large_states_are_sharded_there_too(address):
    store = _save(address, 1, max_shard_bytes=4)
    assert store.load(store.path(1)).model["w"].tolist() == [1.0] * 3
