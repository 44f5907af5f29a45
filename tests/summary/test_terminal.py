import io

import pytest
from rich.console import Console

from tpuspec.summary.terminal import Screen


def _screen(encoding: str = "utf-8", force_interactive: bool | None = None) -> tuple[Screen, io.BytesIO]:
    buffer = io.BytesIO()
    file = io.TextIOWrapper(buffer, encoding=encoding, write_through=True)
    console = Console(file=file, width=60, color_system=None, force_terminal=True,
                      force_interactive=force_interactive)
    return Screen(console), buffer


def test_frame_is_drawn_in_the_characters_that_the_terminal_has():
    screen, buffer = _screen("ascii", force_interactive=True)
    screen.panel("té", {"é": "1"})
    screen.lines("é")
    screen.table("é", {"é": "é"})
    text = buffer.getvalue().decode("ascii")
    assert text.startswith("+- t? -+\n| ?  1 |\n")
    assert text.endswith("?\n?\n  ?  ?\n")


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch, term: str):
    monkeypatch.setenv("TERM", term)
    screen, buffer = _screen()
    assert not screen.can_redraw
    screen.panel("tpuspec", {"devices": "CPU"})
    screen.draw("train  step 1")
    assert buffer.getvalue() == b"tpuspec\n  devices  CPU\ntrain  step 1\n"


def test_long_value_of_a_frame_is_folded_not_cut():
    screen, buffer = _screen(force_interactive=True)
    screen.panel("tpuspec", {"model_dir": "/" + "z" * 80})
    assert buffer.getvalue().count(b"z") == 80
