"""What surrounds a run goes wrong: another run, its output, its paths, its log folder."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.faults.commands import CONFIG
from tests.faults.zygote_process import ROOT

pytestmark = pytest.mark.slow

QUICK = ("quiet=true", "mode=train", "use_tpu=false")


def test_fault_51_the_second_of_two_trainings_exits_with_3_and_a_killed_ones_lock_is_free(commands, tmp_path):
    first = commands.start(tmp_path, *QUICK)
    first.wait_for(lambda: list(first.model_dir.glob("checkpoint-*")))
    second = commands.run(tmp_path, *QUICK)
    assert second.code == 3
    assert re.search(rf"'run'; process {first.pid} on host \S+, for \d+ s, does\. Wait for it", second.first_line)
    first.send(signal.SIGKILL)
    killed = first.wait()
    assert killed.code == -signal.SIGKILL
    third = commands.run(tmp_path, *QUICK, f"run.max_steps={killed.steps()[-1] + 2}")
    assert third.code == 0


def test_fault_27_a_reader_that_goes_away_ends_nothing_and_sees_no_traceback(tmp_path):
    command = [sys.executable, "-m", "tpuspec.train", *CONFIG, "mode=train", "use_tpu=false", "run.max_steps=40",
               "run.log_step_count_steps=1", "model_dir=run"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(240) == 0
    assert "Traceback" not in err and "BrokenPipe" not in err
    assert (tmp_path / "run" / "checkpoint-40").is_dir()


@pytest.mark.parametrize("name", ["größe 模型", "with  spaces and 'quotes'", "/".join(["long" * 40] * 5)],
                         ids=["unicode", "spaces", "long"])
def test_fault_53_paths_of_any_form_work(commands, tmp_path, name):
    quoted = name.replace("'", "\\'")
    ended = commands.run(tmp_path, *QUICK, "run.max_steps=4", f"model_dir='{quoted}'")
    assert ended.code == 0, ended.err
    assert (tmp_path / name / "checkpoint-4").is_dir()
