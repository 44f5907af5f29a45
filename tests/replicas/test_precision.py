"""precision=... on several replicas: the dtypes of the graph, gradients summed in float32, replicas equal."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.graph_dtypes import note_dtypes
from tests.precision_run import NUM_STEPS, Recorder, documented, input_fn, make_trainer, weights

BFLOAT16_ULP = 2.0 ** -8


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
        del table["optimizer's step count"]  # on the host
        assert {part: found for part, found in dtypes.items() if part in table} == table
        assert recorder.host_dtypes == {torch.float32}
        assert len(recorder.losses) == 2 * 2 * NUM_STEPS
        runs.append((recorder.losses, weights(trainer)))
        first, second = trainer._sessions[True].backend.sums_of_parameters(trainer._sessions[True].replicas)
        assert torch.equal(first, second)
    assert runs[0][0] == runs[1][0]
    for name, value in runs[0][1].items():
        assert torch.equal(value, runs[1][1][name]), name


# Each replica's gradients are rounded before they are summed, so that a step may be off by an ulp; in 'bf16' the loss
# is rounded too.
@pytest.mark.parametrize(("precision", "ulps"), [("bf16", 4), ("bf16-mixed", 1)])
def test_several_replicas_train_in_bfloat16_as_one_does(precision, ulps, tmp_path):
    torch.manual_seed(0)
    # Neither statistics nor dropout, which belong to a replica.
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 10))
    losses, found = [], []
    for num_shards in (1, 4):
        recorder = Recorder()
        trainer = make_trainer(recorder, tmp_path / str(num_shards), precision, model=model, num_shards=num_shards)
        trainer.train(input_fn, steps=NUM_STEPS)
        # By update: which rows are in which of its two micro-batches depends on the replicas.
        losses.append(np.reshape(recorder.losses, (NUM_STEPS, 2 * num_shards)).mean(axis=1))
        found.append(weights(trainer))
    assert losses[0].max() > losses[0].min() + 0.1
    np.testing.assert_allclose(losses[1], losses[0], rtol=ulps * BFLOAT16_ULP)
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=ulps * BFLOAT16_ULP)
