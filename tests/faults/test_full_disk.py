"""Real runs whose disk has no room: summaries are given up with one warning, a checkpoint ends the run."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.faults.aftermath import verified_steps
from tests.full_disk import SmallDisk

pytestmark = pytest.mark.slow

QUICK = ("quiet=true", "mode=train", "use_tpu=false", "run.save_summary_steps=1")
NO_SPACE = "No space left on device"


def warned(err: str) -> int:
    """How often a run told of its summaries; it must not print more about them than that."""
    assert "Traceback" not in err
    return err.count("No more summaries are written by ")


def logged_steps(model_dir: Path) -> list[int]:
    """The steps of the losses in metrics.jsonl, in order; torn lines are passed over."""
    steps = []
    for line in (model_dir / "metrics.jsonl").read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        steps += [record["step"]] * (record["name"] == "loss")
    return steps


def shown_steps(model_dir: Path) -> list[int]:
    """The steps of the losses that TensorBoard shows."""
    events = EventAccumulator(str(model_dir), size_guidance={"scalars": 0})
    events.Reload()
    return [event.step for event in events.Scalars("loss")]


def once_each(steps: list[int], last_step: int) -> bool:
    """Whether no step counts twice, and the last one is there."""
    return max(Counter(steps).values()) == 1 and steps[-1] == last_step


def test_fault_54_logs_that_cannot_grow_are_told_of_once_and_a_resume_writes_them_again(commands, tmp_path):
    ended = commands.run(tmp_path, *QUICK, "run.max_steps=1000", file_bytes=48_000)
    assert (ended.code, warned(ended.err), ended.steps()[-1]) == (0, 1, 1000), ended.err
    assert "File too large" in ended.err
    torn = logged_steps(ended.model_dir)
    assert 20 < torn[-1] < 1000 and (ended.model_dir / "metrics.jsonl").stat().st_size == 48_000
    again = commands.run(tmp_path, *QUICK, "run.max_steps=1010")
    assert (again.code, warned(again.err)) == (0, 0), again.err
    assert logged_steps(ended.model_dir) == [*torn, *range(1001, 1011)]
    assert once_each(shown_steps(ended.model_dir), 1010)


def test_fault_54_logs_that_are_deleted_are_told_of_once_and_training_goes_on(commands, tmp_path):
    run = commands.start(tmp_path, *QUICK, "run.save_checkpoints_steps=100000")
    run.wait_for(lambda: (run.model_dir / "metrics.jsonl").exists())
    for file in (*run.model_dir.glob("events.*"), run.model_dir / "metrics.jsonl"):
        file.unlink()
    run.wait_for(lambda: "No more summaries" in run.errors())
    run.send(signal.SIGTERM)
    ended = run.wait()
    assert (ended.code, warned(ended.err)) == (143, 1), ended.err
    assert ended.last_step() > 0


@pytest.mark.hardware
def test_fault_54_a_log_folder_on_a_full_disk_ends_no_evaluation_and_no_training(commands, tmp_path):
    (tmp_path / "run").mkdir()
    with SmallDisk(tmp_path / "run" / "eval", 64_000).mounted() as disk:
        disk.fill()
        ended = commands.run(tmp_path, "quiet=true", "mode=train_and_evaluate", "use_tpu=false", "run.max_steps=20")
    assert (ended.code, ended.steps()) == (0, [0, 20]), ended.err
    assert NO_SPACE in ended.err
    assert warned(ended.err) == 1


@pytest.mark.hardware
def test_fault_06_54_on_a_full_disk_the_run_ends_at_its_next_save_and_goes_on_once_there_is_room(commands, tmp_path):
    with SmallDisk(tmp_path / "run", 4_000_000).mounted() as disk:
        run = commands.start(tmp_path, *QUICK, "run.save_checkpoints_steps=200")
        run.wait_for(lambda: (run.model_dir / "checkpoint-200").exists())
        disk.fill()
        ended = run.wait()
        assert (ended.code, warned(ended.err)) == (3, 1), ended.err
        last = ended.steps()[-1]
        assert ended.first_line.startswith(f"error: The checkpoint checkpoint-{last + 200} could not be written to ")
        assert "the earlier ones are untouched. It needs " in ended.first_line and NO_SPACE in ended.first_line
        assert verified_steps(ended.model_dir) == list(range(0, last + 1, 200))[-3:]
        assert not list(ended.model_dir.glob(".tmp-*"))

        refused = commands.run(tmp_path, *QUICK, f"run.max_steps={last + 200}")
        assert refused.code == 2 and f"{NO_SPACE}. Make room, " in refused.first_line, refused.err
        assert not list(ended.model_dir.glob(".*.json.*")) and not list(ended.model_dir.glob(".probe*"))

        disk.make_room()
        again = commands.run(tmp_path, *QUICK, "run.save_checkpoints_steps=200", f"run.max_steps={last + 200}")
        assert (again.code, warned(again.err)) == (0, 0), again.err
        assert again.steps()[-1] == last + 200
        assert once_each(logged_steps(again.model_dir), last + 200)
        assert once_each(shown_steps(again.model_dir), last + 200)
