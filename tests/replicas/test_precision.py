"""precision=... on several replicas: the dtypes of the graph, gradients summed in float32, replicas equal."""

from __future__ import annotations

import pytest
import torch

from tests.graph_dtypes import note_dtypes
from tests.precision_run import NUM_STEPS, Recorder, documented, input_fn, make_trainer, weights


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-mixed"])
def test_several_replicas_have_the_dtypes_of_the_table_and_the_bits_of_tracing(precision, tmp_path, monkeypatch):
    runs = []
    for capture in ("off", "require"):
        recorder = Recorder()
        trainer = make_trainer(recorder, tmp_path / capture, precision, capture=capture, num_shards=2)
        dtypes = note_dtypes(monkeypatch)
        trainer.train(input_fn, steps=NUM_STEPS)
        monkeypatch.undo()
        table = documented(precision)
        assert {part: found for part, found in dtypes.items() if part in table} == table
        assert recorder.host_dtypes == {torch.float32}
        assert len(recorder.losses) == 2 * 2 * NUM_STEPS
        runs.append((recorder.losses, weights(trainer)))
        first, second = trainer._sessions[True].replicas
        for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
            assert torch.equal(one.detach().cpu(), other.detach().cpu())
    assert runs[0][0] == runs[1][0]
    for name, value in runs[0][1].items():
        assert torch.equal(value, runs[1][1][name]), name
