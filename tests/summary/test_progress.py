import errno
import io
import subprocess
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest
from rich.console import Console

from tpuspec.summary.progress import Progress


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class FailingFile(io.StringIO):
    """A file whose writes raise `error` once it is set."""

    error: Exception | None = None

    def write(self, text: str) -> int:
        if self.error is not None:
            raise self.error
        return super().write(text)


def _plain(file: io.StringIO) -> Progress:
    return Progress(console=Console(file=file, force_terminal=False, width=40))


def _terminal(file: io.StringIO, clock: Callable[[], float] | None = None, width: int = 100) -> Progress:
    console = Console(file=file, force_terminal=True, force_interactive=True, width=width, color_system=None)
    return Progress(console=console, clock=clock or Clock())


def _use_all(progress: Progress) -> None:
    progress.banner("tpuspec", {"devices": "CPU"})
    progress.start("train", 10)
    progress.update(1, loss=1.0)
    progress.message("hello")
    progress.stop()
    progress.table("eval", {"loss": 1.0})


def test_without_a_terminal_all_is_whole_plain_lines():
    file = io.StringIO()
    progress = _plain(file)
    assert not progress.is_live
    progress.banner("tpuspec [0.1]", {"devices": "4 x XLA:CPU", "model_dir": "/a/path/longer/than/the/forty/columns"})
    progress.start("train", 1000)
    progress.update(100, loss=0.5, steps_per_second=81.2, examples_per_second=5200.0, step_kind="traced")
    progress.update(200, loss=0.25, steps_per_second=81.2, examples_per_second=5200.0, step_kind="replay")
    progress.message("saved :smile: [red]")
    progress.stop()
    progress.table("evaluation", {"accuracy": 0.99995, "confusion": np.array([[1, 2], [3, 4]])})
    assert file.getvalue().splitlines() == [
        "tpuspec [0.1]",
        "  devices    4 x XLA:CPU",
        "  model_dir  /a/path/longer/than/the/forty/columns",
        "train  step 100/1000  loss 0.5000  81.2 steps/s  5.2k examples/s  traced",
        "train  step 200/1000  loss 0.2500  81.2 steps/s  5.2k examples/s  replay",
        "saved :smile: [red]",
        "evaluation",
        "  accuracy   0.99995",
        "  confusion  [[1, 2], [3, 4]]",
    ]


def test_banner_is_printed_once():
    file = io.StringIO()
    progress = _plain(file)
    progress.banner("tpuspec", {})
    progress.banner("tpuspec", {})
    assert file.getvalue() == "tpuspec\n"


def test_terminal_shows_a_frame_one_live_line_and_a_table():
    file, clock = io.StringIO(), Clock()
    progress = _terminal(file, clock)
    assert progress.is_live
    progress.banner("tpuspec", {"devices": "[4] x CPU"})
    progress.start("train", 10)
    for step in range(1, 11):
        clock.seconds += 1.0
        progress.update(step, loss=1.0 / step, step_kind="replay")
    progress.stop()
    progress.table("evaluation", {"accuracy": 0.5})
    text = file.getvalue()
    assert "╭─ tpuspec ─" in text
    assert "│ devices  [4] x CPU" in text
    assert all(f"\r\x1b[2Ktrain  step {step}/10" in text for step in range(1, 11))
    assert "train  step 10/10  loss 0.1000  replay\n" in text
    assert text.count("\n") == 3 + 1 + 2
    assert text.endswith("evaluation\n  accuracy  0.5\n")


def test_live_line_is_redrawn_only_every_so_often_and_shows_the_last_step_at_the_end():
    file, clock = io.StringIO(), Clock()
    progress = _terminal(file, clock)
    progress.start("train", None)
    for step in range(1, 1001):
        progress.update(step)
        clock.seconds += 0.001
    before_stop = file.getvalue()
    progress.stop()
    assert 5 <= before_stop.count("train  step") <= 6
    assert "step 1000" not in before_stop
    assert "train  step 1000\n" in file.getvalue()


def test_message_and_the_live_line_do_not_mix():
    file = io.StringIO()
    progress = _terminal(file)
    progress.start("train", 10)
    progress.update(3)
    progress.message("saved")
    progress.stop()
    assert "\r\x1b[2Ksaved\ntrain  step 3/10" in file.getvalue()


def test_live_line_is_cut_to_one_line_of_the_terminal():
    file = io.StringIO()
    progress = _terminal(file, width=20)
    progress.start("train", 10)
    progress.update(1, loss=1.0, steps_per_second=10.0, examples_per_second=10.0)
    progress.stop()
    assert "train  step 1/10  lo\n" in file.getvalue()


def test_next_loop_ends_the_line_before():
    file = io.StringIO()
    progress = _terminal(file)
    progress.start("train", 10)
    progress.update(1)
    progress.start("evaluate", None)
    progress.update(2)
    progress.stop()
    assert "train  step 1/10\n" in file.getvalue()
    assert "evaluate  step 2\n" in file.getvalue()


@pytest.mark.parametrize("make", [_plain, _terminal])
def test_update_before_start_and_after_stop_prints_nothing(make: Callable[[io.StringIO], Progress]):
    file = io.StringIO()
    progress = make(file)
    progress.update(1)
    assert file.getvalue() == ""
    progress.start("train", 10)
    progress.stop()
    printed = file.getvalue()
    progress.update(2)
    progress.stop()
    assert file.getvalue() == printed


def test_leaving_the_block_gives_the_cursor_back():
    file = io.StringIO()
    with _terminal(file) as progress:
        progress.start("train", 10)
        assert "\x1b[?25h" not in file.getvalue()
    assert file.getvalue().endswith("\x1b[?25h")


def test_disabled_prints_nothing(capsys: pytest.CaptureFixture[str]):
    file = io.StringIO()
    progress = Progress(enabled=False, console=Console(file=file, force_terminal=True))
    _use_all(progress)
    assert not progress.is_live
    assert file.getvalue() == ""
    assert capsys.readouterr() == ("", "")


def test_default_is_standard_output(capsys: pytest.CaptureFixture[str]):
    Progress().message("hello")
    assert capsys.readouterr() == ("hello\n", "")


@pytest.mark.parametrize("make", [_plain, _terminal])
def test_closed_stdout_is_silence(make: Callable[[io.StringIO], Progress]):
    file = io.StringIO()
    progress = make(file)
    file.close()
    _use_all(progress)


@pytest.mark.parametrize("make", [_plain, _terminal])
def test_terminal_that_goes_away_in_the_loop_is_silence(make: Callable[[io.StringIO], Progress]):
    file = FailingFile()
    progress = make(file)
    progress.start("train", 10)
    progress.update(1)
    file.error = OSError(errno.EIO, "Input/output error")
    progress.message("lost")
    assert not progress.is_live
    printed = file.getvalue()
    file.error = None
    _use_all(progress)
    assert file.getvalue() == printed


def test_error_that_is_not_of_the_output_is_raised():
    file = FailingFile()
    progress = _plain(file)
    file.error = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"):
        progress.message("hello")


def test_broken_pipe_ends_neither_the_run_nor_leaves_a_traceback():
    code = """
import sys
from tpuspec.summary.progress import Progress
sys.stdin.read()  # until the reader of stdout is gone
progress = Progress()
progress.message("lost")
progress.start("train", None)
progress.update(1)
progress.stop()
print("lost too")
print("done", file=sys.stderr)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    assert process.communicate(input="") == (None, "done\n")
    assert process.returncode == 0


def test_worker_updates_while_the_main_thread_prints():
    file = io.StringIO()
    progress = _terminal(file, clock=iter(range(10**6)).__next__)
    threads = threading.active_count()
    progress.start("train", 200)
    assert threading.active_count() == threads
    worker = threading.Thread(target=lambda: [progress.update(step) for step in range(1, 201)])
    worker.start()
    for i in range(100):
        progress.message(f"message {i}")
    worker.join()
    progress.stop()
    lines = [line.rsplit("\x1b[2K", 1)[-1] for line in file.getvalue().splitlines()]
    assert [line for line in lines if line.startswith("message")] == [f"message {i}" for i in range(100)]
    assert "train  step 200/200" in lines


def test_standard_streams_pass_through_the_live_line_only_where_they_are_the_terminal():
    stdout, stderr = sys.stdout, sys.stderr
    progress = _terminal(io.StringIO())
    progress.start("train", 10)
    assert (sys.stdout, sys.stderr) == (stdout, stderr)
    progress.stop()


def test_print_appears_above_the_live_line_of_a_terminal(monkeypatch: pytest.MonkeyPatch):
    terminal, log = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(sys, "stderr", log)
        patch.setenv("TERM", "xterm")
        progress = Progress(clock=Clock())
        progress.start("train", 10)
        progress.update(1)
        print("from host_call")
        print("warning", file=sys.stderr)
        progress.stop()
        assert sys.stdout is terminal
    assert "\r\x1b[2Kfrom host_call\n" in terminal.getvalue()
    assert log.getvalue() == "warning\n"
