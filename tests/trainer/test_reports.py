"""What a person sees of a run: lines, tables, summaries."""

from __future__ import annotations

import tpuspec
from tests.regression import (
    make_trainer,
    rows_input,
    scalars,
)


def test_summary_functions_work_inside_host_call(tmp_path):
    def host_call(global_step, loss):
        tpuspec.summary.scalar("mine", loss[0])
        tpuspec.summary.text("note", "hello", step=int(global_step[0]))

    for use_tpu in (True, False):
        trainer = make_trainer(tmp_path / str(use_tpu), params={"host_call": host_call}, use_tpu=use_tpu)
        trainer.train(rows_input(), max_steps=3)
        written = scalars(tmp_path / str(use_tpu))
        assert written["mine"] == [1, 2, 3]
        assert written["note"] == [0, 1, 2]


def test_a_trainer_without_progress_prints_nothing(tmp_path, capsys):
    trainer = make_trainer(tmp_path)
    trainer.train(rows_input(), max_steps=2)
    trainer.evaluate(rows_input())
    assert capsys.readouterr().out == ""


def test_banner_progress_and_table_are_plain_lines_without_a_terminal(tmp_path, capsys):
    trainer = make_trainer(tmp_path, show_progress=True, log_step_count_steps=2)
    trainer.train(rows_input(), max_steps=4)
    trainer.evaluate(rows_input())
    trainer.train(rows_input(), max_steps=4)
    out = capsys.readouterr().out
    assert out.count("devices") == 1 and "1 x CPU" in out
    assert "step 2/4" in out and "step 4/4" in out and "captured" in out and "replay" in out
    assert "mean_error" in out and "training is complete: global step 4 of 4" in out
    assert "\x1b" not in out


def test_a_short_run_reports_its_last_step_too(tmp_path, capsys):
    make_trainer(tmp_path, show_progress=True).train(rows_input(), max_steps=5)
    assert "step 5/5" in capsys.readouterr().out
    assert scalars(tmp_path) == {"loss": [5], "global_step/sec": [5], "examples/sec": [5]}
