import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tpuspec.errors import ConfigError
from tpuspec.summary import JsonlWriter, MultiWriter, SummaryWriter, create_file_writer


class MemoryWriter:
    """Keeps its calls; raises `error` from all of them where one is given."""

    logdir = "/memory"

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._error = error

    def _call(self, *call: Any) -> None:
        self.calls.append(call)
        if self._error is not None:
            raise self._error

    def scalar(self, name: str, value: Any, step: int) -> None:
        self._call("scalar", name, value, step)

    def histogram(self, name: str, values: Any, step: int) -> None:
        self._call("histogram", name, values, step)

    def image(self, name: str, image: Any, step: int) -> None:
        self._call("image", name, image, step)

    def text(self, name: str, text: str, step: int) -> None:
        self._call("text", name, text, step)

    def flush(self) -> None:
        self._call("flush")

    def close(self) -> None:
        self._call("close")


def _write_all(writer: SummaryWriter) -> None:
    writer.scalar("loss", 1.0, 1)
    writer.histogram("weights", [1.0], 1)
    writer.image("digits", [[0.5]], 1)
    writer.text("note", "hello", 1)
    writer.flush()
    writer.close()


def test_each_writer_gets_every_call():
    first, second = MemoryWriter(), MemoryWriter()
    _write_all(MultiWriter([first, second]))
    assert [call[0] for call in first.calls] == ["scalar", "histogram", "image", "text", "flush", "close"]
    assert second.calls == first.calls


def test_without_writers_all_is_discarded():
    _write_all(MultiWriter([]))


def test_writer_that_fails_is_warned_of_once_closed_and_left_out(caplog: pytest.LogCaptureFixture):
    bad, good = MemoryWriter(OSError(28, "No space left on device")), MemoryWriter()
    writer = MultiWriter([bad, good])
    with caplog.at_level(logging.WARNING):
        writer.scalar("loss", 1.0, 1)
        writer.scalar("loss", 1.0, 2)
    (record,) = caplog.records
    assert "MemoryWriter to /memory" in record.getMessage()
    assert "No space left on device" in record.getMessage()
    assert [call[0] for call in bad.calls] == ["scalar", "close"]
    assert [call[-1] for call in good.calls] == [1, 2]


def test_an_error_of_the_user_is_raised():
    writer = MultiWriter([MemoryWriter(ConfigError("scalar takes one number"))])
    with pytest.raises(ConfigError, match="takes one number"):
        writer.scalar("loss", 1.0, 1)


def test_file_writer_makes_event_files_and_lines(tmp_path: Path):
    writer = create_file_writer(tmp_path / "logs")
    assert not (tmp_path / "logs").exists()
    writer.scalar("loss", torch.tensor([0.5]), 1)
    writer.close()
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert events.Scalars("loss")[0].value == 0.5
    assert '"value": 0.5' in (tmp_path / "logs" / "metrics.jsonl").read_text()


def test_run_goes_on_when_its_log_folder_is_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    writer = create_file_writer(tmp_path / "logs")
    writer.scalar("loss", 1.0, 1)
    writer.flush()
    shutil.rmtree(tmp_path / "logs")
    for step in range(2, 5):
        writer.scalar("loss", 1.0, step)
    writer.flush()
    writer.close()
    (record,) = caplog.records
    assert record.getMessage().startswith(
        f"No more summaries are written by TensorBoardWriter to {tmp_path / 'logs'}, which failed: ")
    assert not (tmp_path / "logs").exists()


def test_each_folder_that_fails_is_told_of(caplog: pytest.LogCaptureFixture):
    writers = [MemoryWriter(OSError(28, "No space left on device")) for _ in range(3)]
    writers[2].logdir = "/other"
    MultiWriter(writers).scalar("loss", 1.0, 1)
    assert ["/memory" in record.getMessage() for record in caplog.records] == [True, False]
    assert [[call[0] for call in writer.calls] for writer in writers] == [["scalar", "close"]] * 3


def test_folder_that_cannot_be_made_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").write_text("")
    writer = MultiWriter([JsonlWriter(tmp_path / "file" / "logs")])
    writer.scalar("loss", 1.0, 1)
    writer.close()
    assert "Not a directory" in caplog.text


def test_remote_folder_gets_event_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    writer = create_file_writer(f"file://{tmp_path}/logs")
    writer.scalar("loss", 1.0, 1)
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]
    assert [path.name.split(".")[0] for path in (tmp_path / "logs").iterdir()] == ["events"]
