import errno
import os
from pathlib import Path

import pytest

from tpuspec.files import commit as module
from tpuspec.files.commit import commit, discard, sweep

OLD, NEW = {"a": "old", "b": "old"}, {"a": "new", "b": "new"}


def _writer(files):
    def write(folder: Path) -> None:
        for name, text in files.items():
            (folder / name).write_text(text)

    return write


def _read(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


def _is_complete(folder: Path) -> bool:
    return {file.name for file in folder.iterdir()} == {"a", "b"}


def _fail_call(monkeypatch, owner, name, number):
    """Makes the call `number` (from 1) of a function fail; returns how often it was called."""
    real, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == number:
            raise OSError(errno.EIO, f"{name} call {number}")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    return calls


def test_a_commit_is_the_only_thing_in_the_parent(tmp_path):
    commit(tmp_path / "x", _writer(NEW))
    assert os.listdir(tmp_path) == ["x"]
    assert _read(tmp_path / "x") == NEW


def test_a_second_commit_replaces_the_first(tmp_path):
    commit(tmp_path / "x", _writer({"c": "old"}))
    commit(tmp_path / "x", _writer(NEW))
    assert os.listdir(tmp_path) == ["x"]
    assert _read(tmp_path / "x") == NEW


def test_files_and_folders_are_synced_before_and_after_the_rename(tmp_path, monkeypatch):
    order = []
    real_sync, real_rename = module.sync_folder, module.rename
    monkeypatch.setattr(module, "sync_folder", lambda path: (order.append(path.name), real_sync(path)))
    monkeypatch.setattr(module, "rename", lambda a, b: (order.append("rename"), real_rename(a, b)))
    commit(tmp_path / "x", _writer(NEW))
    assert order[0].startswith(".tmp-x-")
    assert order[1:] == ["rename", tmp_path.name]


_CALLS = [(module, "make_folder", 1), *[(module, "sync_folder", n) for n in (1, 2)], (module, "rename", 1)]


@pytest.mark.parametrize(("replaces", "owner", "name", "number"), [
    *[(False, *call) for call in _CALLS],
    *[(True, *call) for call in _CALLS],
    (True, module, "rename", 2),
], ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_failure_at_any_call_leaves_what_was_there(tmp_path, monkeypatch, replaces, owner, name, number):
    if replaces:
        commit(tmp_path / "x", _writer(OLD))
    with monkeypatch.context() as patch:
        _fail_call(patch, owner, name, number)
        with pytest.raises(OSError, match=f"{name} call {number}"):
            commit(tmp_path / "x", _writer(NEW))
    assert os.listdir(tmp_path) == (["x"] if replaces else [])
    if replaces:
        assert _read(tmp_path / "x") == OLD


def test_an_interrupt_while_writing_leaves_what_was_there(tmp_path):
    def write(folder):
        (folder / "a").write_text("half")
        raise KeyboardInterrupt("^C")

    commit(tmp_path / "x", _writer(OLD))
    with pytest.raises(KeyboardInterrupt, match=r"\^C"):
        commit(tmp_path / "x", write)
    assert os.listdir(tmp_path) == ["x"]
    assert _read(tmp_path / "x") == OLD


def test_an_old_folder_that_cannot_be_deleted_does_not_fail_the_commit(tmp_path, monkeypatch):
    commit(tmp_path / "x", _writer(OLD))
    with monkeypatch.context() as patch:
        _fail_call(patch, module, "remove", 1)
        commit(tmp_path / "x", _writer(NEW))
    assert _read(tmp_path / "x") == NEW
    sweep(tmp_path, _is_complete)
    assert os.listdir(tmp_path) == ["x"]


def test_sweep_leaves_the_folders_of_a_live_writer(tmp_path):
    def write(folder):
        _writer(NEW)(folder)
        sweep(tmp_path, _is_complete)

    commit(tmp_path / "x", write)
    assert _read(tmp_path / "x") == NEW


def test_sweep_deletes_an_incomplete_old_folder_and_trash_but_nothing_foreign(tmp_path):
    for name in (".old-x-00000000", ".del-y-00000000", ".tmp-z-00000000", ".tmp-mine", "x2", ".hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("")
    sweep(tmp_path, _is_complete)
    assert sorted(os.listdir(tmp_path)) == [".hidden", ".tmp-mine", "x2"]


def test_discard_deletes_the_folder(tmp_path):
    commit(tmp_path / "x", _writer(NEW))
    discard(tmp_path / "x")
    assert os.listdir(tmp_path) == []


def test_discard_takes_the_name_away_before_any_file(tmp_path, monkeypatch):
    commit(tmp_path / "x", _writer(NEW))
    _fail_call(monkeypatch, module, "remove", 1)
    with pytest.raises(OSError, match="remove call 1"):
        discard(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_discard_of_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="x"):
        discard(tmp_path / "x")
