"""precision=...: the dtypes of the compiled graph are those that docs/precision.md says."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.graph_dtypes import note_dtypes
from tests.precision_run import NUM_STEPS, Recorder, documented, input_fn, make_model, make_trainer, weights
from tpuspec import CrossShardOptimizer, RunConfig, SessionRunHook, TPUEstimatorSpec, Trainer

PRECISIONS = ["fp32", "bf16", "bf16-mixed"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_graph_has_the_dtypes_of_the_table_and_replays_with_the_bits_of_tracing(precision, tmp_path, monkeypatch):
    runs = {}
    for capture in ("off", "require"):
        recorder = Recorder()
        trainer = make_trainer(recorder, tmp_path / capture, precision, capture=capture)
        dtypes = note_dtypes(monkeypatch)
        trainer.train(input_fn, steps=NUM_STEPS)
        # Read before evaluation, whose graph is another one.
        train_dtypes = {part: set(found) for part, found in dtypes.items()}
        result = trainer.evaluate(input_fn)
        predictions = [row["logits"] for row in trainer.predict(input_fn)]
        assert recorder.host_dtypes == {torch.float32}
        assert {row.dtype for row in predictions} == {np.dtype("float32")}
        runs[capture] = (recorder.losses, weights(trainer), result, np.stack(predictions))
        monkeypatch.undo()
    table = documented(precision)
    assert dtypes["matrix products and convolutions"] == table["matrix products and convolutions"]
    del table["gradients while they are summed over replicas"]
    del table["optimizer's step count"]  # on the host
    assert {part: found for part, found in train_dtypes.items() if part in table} == table
    assert runs["off"][0] == runs["require"][0]
    assert len(runs["off"][0]) == 2 * NUM_STEPS
    for name, value in runs["off"][1].items():
        assert torch.equal(value, runs["require"][1][name]), name
    assert runs["off"][2] == runs["require"][2]
    assert (runs["off"][3] == runs["require"][3]).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_plain_pytorch_has_the_same_dtypes(precision, tmp_path):
    table = {part: {"f32": torch.float32, "bf16": torch.bfloat16}[found.pop()]
             for part, found in documented(precision).items()}
    recorder, products, batches = Recorder(), set(), set()
    model = make_model()
    for layer in (model[2], model[-1]):
        layer.register_forward_hook(lambda module, args, output: products.add(output.dtype))
    model.register_forward_pre_hook(lambda module, args: batches.add(args[0].dtype))
    trainer = make_trainer(recorder, tmp_path, precision, model=model, use_tpu=False)
    trainer.train(input_fn, steps=2)
    assert products == {table["matrix products and convolutions"]}
    assert batches == {table["floats of the batch"]}
    assert recorder.host_dtypes == {torch.float32}
    replica = trainer._sessions[False].replicas[0]
    assert {p.dtype for p in replica.model.parameters()} == {table["parameters"]}
    assert {b.dtype for b in replica.model.buffers() if b.is_floating_point()} == {table["float buffers"]}
    (optimizer,) = replica.optimizers.values()
    states = [(key, value.dtype) for state in optimizer.state.values() for key, value in state.items()]
    assert {dtype for key, dtype in states if key == "step"} == {table["optimizer's step count"]}
    assert {dtype for key, dtype in states if key != "step"} == {table["optimizer's moments"]}
    assert 0 <= trainer.evaluate(input_fn)["accuracy"] <= 1
    assert next(trainer.predict(input_fn))["logits"].dtype == np.float32


@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
def test_less_precision_gives_nearly_the_same_training(precision, tmp_path):
    recorders, losses = [Recorder(), Recorder()], []
    model = make_model()
    model[4].p = 0.0  # dropout draws other units in another dtype
    for recorder, name in zip(recorders, ("fp32", precision), strict=True):
        losses.append(make_trainer(recorder, tmp_path / f"{name}-xla", name, model=model).evaluate(input_fn)["loss"])
        make_trainer(recorder, tmp_path / name, name, model=model, use_tpu=False).train(input_fn, steps=NUM_STEPS)
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert recorders[0].losses != recorders[1].losses
    np.testing.assert_allclose(recorders[1].losses, recorders[0].losses, rtol=0.1)


class TwoPasses(nn.Module):
    """A linear layer, and what its second pass of a step gave."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.register_buffer("first", torch.zeros(8, 2))
        self.register_buffer("second", torch.zeros(8, 2))
        self.register_buffer("expected", torch.zeros(8, 2))


@pytest.mark.parametrize("use_tpu", [True, False])
def test_a_second_pass_within_a_mixed_step_sees_the_weights_of_the_first_update(use_tpu, tmp_path):
    def model_fn(features, labels, mode, params, model, optimizer):
        output = model.linear(features)
        loss = output.square().mean()

        def train_op():
            loss.backward()
            CrossShardOptimizer(optimizer).step()
            with torch.no_grad():
                model.first.copy_(output)
                second = model.linear(features)
                assert second.dtype is torch.bfloat16
                model.second.copy_(second)
                weight, bias = model.linear.weight.bfloat16(), model.linear.bias.bfloat16()
                model.expected.copy_(F.linear(features.bfloat16(), weight, bias))
            optimizer.zero_grad()

        return TPUEstimatorSpec(mode, loss=loss, train_op=train_op)

    torch.manual_seed(0)
    trainer = Trainer(model_fn, model=TwoPasses(), params={}, model_dir=tmp_path, train_batch_size=8,
                      optimizer=lambda model, params: torch.optim.SGD(model.parameters(), lr=1.0), use_tpu=use_tpu,
                      config=RunConfig(seed=0, precision="bf16-mixed", show_progress=False))
    trainer.train(lambda params: [torch.randn(8, 4) for _ in range(5)], steps=5)
    state = weights(trainer)
    torch.testing.assert_close(state["second"], state["expected"], rtol=1e-2, atol=1e-2)
    assert (state["second"] - state["first"]).abs().max() > 0.1


@pytest.mark.parametrize(("first", "second"), [("fp32", "bf16"), ("bf16", "bf16-mixed"), ("bf16-mixed", "fp32")])
def test_a_checkpoint_restores_in_another_precision_and_says_so(first, second, tmp_path, caplog):
    model = make_model()
    trainer = make_trainer(Recorder(), tmp_path, first, model=model, use_tpu=False)
    trainer.train(input_fn, max_steps=2)
    saved = weights(trainer)
    caplog.clear()
    again = make_trainer(Recorder(), tmp_path, second, model=model, use_tpu=False)
    restored = {}

    class Look(SessionRunHook):
        def begin(self, context):
            restored.update(copy.deepcopy(context.model.state_dict()))

    again.train(input_fn, max_steps=3, hooks=[Look()])
    assert restored.keys() == saved.keys()
    for name, value in restored.items():
        assert torch.equal(value, saved[name].to(value.dtype)), name
    told = [record.message for record in caplog.records if record.levelno >= logging.WARNING
            and "written in another precision" in record.message]
    assert len(told) == ("bf16" in (first, second))
