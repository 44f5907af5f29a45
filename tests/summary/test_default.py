import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tpuspec import summary
from tpuspec.errors import ConfigError, ConfigTypeError


def _steps(folder: Path) -> list[tuple[str, int]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["name"], line["step"]) for line in lines]


@pytest.mark.parametrize("call", [
    lambda: summary.scalar("loss", 1.0, 1), lambda: summary.histogram("weights", [1.0], 1),
    lambda: summary.image("digits", torch.zeros(2, 2), 1), lambda: summary.text("note", "hello", 1)])
def test_call_outside_a_default_writer_names_the_rule(call: Callable[[], None]):
    with pytest.raises(ConfigError, match=r"works inside host_call, or within tpuspec\.summary\.as_default"):
        call()


def test_calls_take_the_step_of_the_block_or_their_own(tmp_path: Path):
    writer = summary.JsonlWriter(tmp_path)
    with summary.as_default(writer, step=torch.tensor([5])) as default:
        assert default is writer
        summary.scalar("loss", 1.0)
        summary.histogram("weights", [1.0])
        summary.image("digits", torch.zeros(2, 2))
        summary.text("note", "hello", step=9)
        summary.scalar("zero", 1.0, step=0)
    writer.close()
    assert _steps(tmp_path) == [("loss", 5), ("weights", 5), ("digits", 5), ("note", 9), ("zero", 0)]


def test_block_without_a_step_needs_one_from_the_call(tmp_path: Path):
    with summary.as_default(summary.JsonlWriter(tmp_path)), pytest.raises(ConfigError, match=r"scalar needs a step"):
        summary.scalar("loss", 1.0)


def test_inner_block_wins_and_the_outer_returns(tmp_path: Path):
    outer, inner = summary.JsonlWriter(tmp_path / "outer"), summary.JsonlWriter(tmp_path / "inner")
    with summary.as_default(outer, 1):
        with summary.as_default(inner, 2):
            summary.scalar("loss", 1.0)
        summary.scalar("loss", 1.0)
    outer.close()
    inner.close()
    assert _steps(tmp_path / "inner") == [("loss", 2)]
    assert _steps(tmp_path / "outer") == [("loss", 1)]


def test_default_ends_with_its_block_when_the_block_raises(tmp_path: Path):
    with pytest.raises(KeyError, match="user"), summary.as_default(summary.JsonlWriter(tmp_path), 1):
        raise KeyError("user")
    with pytest.raises(ConfigError, match="works inside host_call"):
        summary.scalar("loss", 1.0)


def test_default_of_one_thread_is_not_that_of_another(tmp_path: Path):
    errors: list[str] = []

    def call() -> None:
        try:
            summary.scalar("loss", 1.0)
        except ConfigError as error:
            errors.append(str(error))

    with summary.as_default(summary.JsonlWriter(tmp_path), 1):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert "works inside host_call" in errors[0]


def test_folder_in_place_of_a_writer_is_refused():
    with pytest.raises(ConfigTypeError, match=r"takes a SummaryWriter; got str.*create_file_writer"), \
            summary.as_default("logs"):  # type: ignore[arg-type]
        pass
