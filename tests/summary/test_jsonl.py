import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.full_disk import full_at
from tpuspec.errors import ConfigError
from tpuspec.summary.jsonl import JsonlWriter


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def read(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=_refuse) for line in lines]


def test_each_kind_is_one_line_with_step_name_and_wall_time(tmp_path: Path):
    writer = JsonlWriter(tmp_path / "logs", clock=lambda: 12.5)
    writer.scalar("loss", torch.tensor([0.25]), 3)
    writer.text("note", "two\nlines é", 3)
    writer.histogram("weights", np.array([[1.0, 3.0]]), 4)
    writer.image("digits", torch.zeros(2, 3, 8, 8), 4)
    writer.close()
    assert read(tmp_path / "logs") == [
        {"step": 3, "name": "loss", "value": 0.25, "wall_time": 12.5},
        {"step": 3, "name": "note", "text": "two\nlines é", "wall_time": 12.5},
        {"step": 4, "name": "weights", "histogram": {"count": 2, "min": 1.0, "max": 3.0, "mean": 2.0, "std": 1.0},
         "wall_time": 12.5},
        {"step": 4, "name": "digits", "shape": [2, 3, 8, 8], "wall_time": 12.5},
    ]


def test_numbers_that_json_lacks_are_strings_which_float_reads(tmp_path: Path):
    writer = JsonlWriter(tmp_path)
    for value in (math.nan, math.inf, -math.inf):
        writer.scalar("loss", value, 1)
    writer.histogram("weights", [math.inf, -math.inf, 0.0], 1)
    writer.close()
    lines = read(tmp_path)
    assert [line["value"] for line in lines[:3]] == ["NaN", "Infinity", "-Infinity"]
    assert lines[3]["histogram"] == {"count": 3, "min": "-Infinity", "max": "Infinity", "mean": "NaN", "std": "NaN"}
    assert float(lines[2]["value"]) == -math.inf


def test_histogram_of_nothing_counts_zero(tmp_path: Path):
    writer = JsonlWriter(tmp_path)
    writer.histogram("weights", torch.zeros(0), 1)
    writer.close()
    assert read(tmp_path)[0]["histogram"] == {"count": 0, "min": None, "max": None, "mean": None, "std": None}


def test_line_is_readable_before_flush_and_close(tmp_path: Path):
    writer = JsonlWriter(tmp_path)
    writer.scalar("loss", 1.0, 1)
    assert len(read(tmp_path)) == 1
    writer.close()


def test_nothing_is_created_before_the_first_write(tmp_path: Path):
    writer = JsonlWriter(tmp_path / "logs")
    writer.flush()
    writer.close()
    assert not (tmp_path / "logs").exists()


def test_refused_value_writes_nothing(tmp_path: Path):
    with pytest.raises(ConfigError, match="takes one number"):
        JsonlWriter(tmp_path / "logs").scalar("loss", torch.zeros(2), 1)
    assert not (tmp_path / "logs").exists()


def test_a_later_run_appends(tmp_path: Path):
    for step in (1, 2):
        writer = JsonlWriter(tmp_path)
        writer.scalar("loss", 1.0, step)
        writer.close()
    assert [line["step"] for line in read(tmp_path)] == [1, 2]


def test_writer_goes_on_after_close(tmp_path: Path):
    writer = JsonlWriter(tmp_path)
    for step in (1, 2):
        writer.scalar("loss", 1.0, step)
        writer.close()
    assert [line["step"] for line in read(tmp_path)] == [1, 2]


def test_torn_last_line_stays_alone_on_its_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "name": "loss", "value": 1.0}\n{"step": 2, "na')
    writer = JsonlWriter(tmp_path)
    writer.scalar("loss", 1.0, 3)
    writer.close()
    lines = path.read_text().splitlines()
    assert lines[1] == '{"step": 2, "na'
    assert json.loads(lines[2])["step"] == 3


def test_deleted_folder_is_an_oserror_that_names_the_file(tmp_path: Path):
    writer = JsonlWriter(tmp_path / "logs")
    writer.scalar("loss", 1.0, 1)
    shutil.rmtree(tmp_path / "logs")
    with pytest.raises(FileNotFoundError, match=r"was deleted.*metrics\.jsonl"):
        writer.scalar("loss", 1.0, 2)
    writer.close()


def test_full_disk_is_an_oserror_and_the_next_line_is_whole(tmp_path: Path):
    writer = JsonlWriter(tmp_path, clock=lambda: 1.0)
    writer.scalar("loss", 1.0, 1)
    with full_at(Path(writer.path).stat().st_size + 10), pytest.raises(OSError, match="File too large"):
        writer.scalar("loss", 1.0, 2)
    writer.scalar("loss", 1.0, 3)
    writer.close()
    lines = Path(writer.path).read_text().splitlines()
    assert lines[1] == '{"step": 2'
    assert [json.loads(line)["step"] for line in (lines[0], lines[2])] == [1, 3]


def test_relative_folder_is_kept_when_the_working_directory_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    writer = JsonlWriter("logs")
    monkeypatch.chdir("/")
    writer.scalar("loss", 1.0, 1)
    writer.close()
    assert len(read(tmp_path / "logs")) == 1


def test_fault_54_lines_behind_the_step_that_a_run_goes_on_from_are_dropped(tmp_path):
    for after_step, steps in ((0, [1, 2, 3, 4]), (2, [3, 4, 5])):
        writer = JsonlWriter(tmp_path, after_step)
        for step in steps:
            writer.scalar("loss", 10 * after_step + step, step)
        writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["value"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0), (5, 25.0)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_fault_54_a_full_disk_keeps_lines_from_being_dropped_and_they_are_dropped_once_it_has_room(tmp_path):
    writer = JsonlWriter(tmp_path)
    for step in range(1, 40):
        writer.scalar("loss", 1.0, step)
    writer.close()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    resumed = JsonlWriter(tmp_path, after_step=30)
    with full_at(100), pytest.raises(OSError, match="File too large"):
        resumed.scalar("loss", 2.0, 31)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    resumed.scalar("loss", 2.0, 31)
    resumed.close()
    assert [(line["step"], line["value"]) for line in read(tmp_path)[-2:]] == [(30, 1.0), (31, 2.0)]
