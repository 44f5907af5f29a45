"""Runs in which nothing moves any more end by their watchdog."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("place", "phase", "function", "arguments"), [
    ("input_fn", "input_fn", "__getitem__", ["use_tpu=false", "mode=train"]),
    ("model_fn", "model_fn", "model_fn", ["use_tpu=false", "mode=train"]),
    ("host_call", "host work", "host_call", ["mode=train"]),
    ("metric_fn", "host work", "metric_fn", []),
])
def test_fault_37_an_endless_loop_in_user_code_ends_with_4_and_the_stacks(commands, tmp_path, place, phase, function,
                                                                        arguments):
    ended = commands.run(tmp_path, "quiet=true", "run.hang_seconds=6", f"params.place={place}", "params.how=hang",
                         "run.host_queue_size=1", *arguments)
    assert ended.code == 4
    assert ended.first_line.startswith("error: no step, batch or host work has moved for ")
    assert f" s, in {phase}. " in ended.first_line
    assert "raise RunConfig.hang_seconds" in ended.first_line
    assert 'faulty.py", line' in ended.err and f"in {function}\n" in ended.err
    assert ended.steps() == ([0] if place != "metric_fn" else [0, 20])


def test_fault_11_a_save_that_hangs_ends_with_4(commands, tmp_path):
    ended = commands.run(tmp_path, "quiet=true", "mode=train", "use_tpu=false", "run.checkpoint_timeout_secs=1",
                         "params.place=disk")
    assert ended.code == 4
    assert ended.first_line.startswith("error: The checkpoint of step 0 is being written for more than 1.0 s")
