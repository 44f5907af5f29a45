from __future__ import annotations

import glob
import tempfile

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from tpuspec.summary import create_file_writer, event_file
from tpuspec.summary.remote import SECONDS_BETWEEN_UPLOADS, RemoteTensorBoardWriter


@pytest.fixture
def address(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield f"memory:/{tmp_path}"
    assert not glob.glob(f"{tmp_path}/tpuspec-events-*"), "the temporary folder stays"


def _steps(address, tmp_path) -> list[int]:
    fs, path = fsspec.url_to_fs(address)
    steps = []
    for number, name in enumerate(sorted(fs.find(path))):
        (tmp_path / f"{number}.tfevents").write_bytes(fs.cat_file(name))
        events = EventFileLoader(str(tmp_path / f"{number}.tfevents")).Load()
        steps += [event.step for event in events if event.summary.value]
    return steps


def test_what_was_written_is_at_the_address_after_flush_and_close(address, tmp_path):
    writer = RemoteTensorBoardWriter(address)
    writer.flush()
    writer.scalar("a", 1.0, 1)
    assert _steps(address, tmp_path) == []
    writer.flush()
    assert _steps(address, tmp_path) == [1]
    writer.scalar("a", 1.0, 2)
    writer.close()
    writer.close()
    assert _steps(address, tmp_path) == [1, 2]
    writer.text("a", "b", 3)
    writer.close()
    assert _steps(address, tmp_path) == [1, 2, 3]


def test_once_a_minute_it_is_uploaded_without_a_flush(address, tmp_path):
    now = [0.0]
    writer = RemoteTensorBoardWriter(address, clock=lambda: now[0])
    writer.scalar("a", 1.0, 1)
    now[0] += SECONDS_BETWEEN_UPLOADS
    writer.histogram("a", [1.0], 2)
    assert _steps(address, tmp_path) == [1, 2]
    writer.close()


def test_writers_one_behind_the_other_leave_nothing_in_memory(address):
    for step in range(3):
        writer = RemoteTensorBoardWriter(address)
        writer.scalar("a", 1.0, step)
        writer.close()
    assert sum("tpuspec-events-" in path for path in event_file._closed.values()) <= 1


def test_a_place_that_refuses_is_warned_of_and_left_out(address, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise NotImplementedError("not here")

    monkeypatch.setattr(MemoryFileSystem, "put_file", fail)
    writer = create_file_writer(address)
    writer.scalar("loss", 1.0, 1)
    writer.flush()
    writer.scalar("loss", 1.0, 2)
    writer.close()
    assert "No more summaries are written by RemoteTensorBoardWriter" in caplog.text
    assert "NotImplementedError: not here" in caplog.text
