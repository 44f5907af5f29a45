"""Steps that are traced for good: which of them the watchdog grants the time of a compile."""

from __future__ import annotations

import pytest
from torch import nn

from tests.tracer.test_capture import batches, classify, rows, run, sgd
from tpuspec.spec.phase import current_phase
from tpuspec.tracer import graph


@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_first_steps_are_in_the_phase_of_compiling_until_one_needed_no_compile(accumulate_steps, monkeypatch, tmp_path):
    seen, end_step = [], graph.end_step

    def noting():
        phase = current_phase()
        compiled = end_step()
        seen.append((phase, compiled))
        return compiled

    monkeypatch.setattr(graph, "end_step", noting)

    def reading(features, labels, mode, params, model, optimizer):
        features.sum().cpu()
        return classify(features, labels, mode, params, model, optimizer)

    model = nn.Sequential(nn.Linear(4, 10 + accumulate_steps), nn.Linear(10 + accumulate_steps, 3))  # no other test's
    run("off", reading, model, sgd, batches(rows), tmp_path, steps=6,
        params={"minimize": {"accumulate_steps": accumulate_steps}})
    assert len(seen) == 6 * accumulate_steps - 2  # the first two find out that it reads
    assert all(phase == "compile" for phase, compiled in seen if compiled)
    assert seen[0][0] == "compile"
    assert {phase for phase, _ in seen[-2:]} == {"train"}
