"""A branch on a value of the device is replayed while the value is the same, and equals tracing where it is not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.tracer.test_capture import assert_same, batches, kind, rows, run, sgd
from tpuspec import CrossShardOptimizer, ModeKeys, SessionRunHook, TPUEstimatorSpec
from tpuspec.errors import CaptureError


class Net(nn.Module):
    """A linear layer that counts its calls on the device."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("first_mean", torch.zeros(4))
        self.flag = torch.ones(())

    def forward(self, x):
        return self.linear(x)


def first_call(model, x, step):
    if model.num_calls == 0:
        model.first_mean.copy_(x.mean(0))
    model.num_calls += 1
    return model(x - model.first_mean)


def by_batch(model, x, step):
    return model(x * 2 if (x.sum() > 0).item() else x)


def by_step(model, x, step):
    return model(x if bool(step % 5 == 0) else x * 0.5)


def three_ways(model, x, step):
    return model(x * (1 + int(step % 3)))


def nested(model, x, step):
    if (x.sum() > 0).item() and model.linear.weight.sum() > x.mean():
        x = x * 2
    return model(x)


def by_dropout(model, x, step):
    mask = model.dropout(torch.ones_like(x))
    return model(x * mask if mask.sum() > x.numel() else x)


def no_value(model, x, step):
    if (x.sum() / 0 * 0).item() != 0:  # NaN
        x = x * 2
    return model(x)


def by_mask(model, x, step):
    mask = torch.ones_like(x, dtype=torch.bool)
    return model(x if mask.all() else x * mask)


BRANCHES = {function.__name__: function for function in (
    first_call, by_batch, by_step, three_ways, nested, by_dropout, no_value, by_mask)}


def model_fn_of(forward):
    def model_fn(features, labels, mode, params, model, optimizer, global_step):
        if mode == ModeKeys.PREDICT:
            return TPUEstimatorSpec(mode, predictions={"y": forward(model, features, global_step)})
        losses = F.cross_entropy(forward(model, features, global_step), labels, reduction="none")
        if mode == ModeKeys.EVAL:
            return TPUEstimatorSpec(mode, loss=losses)
        loss = losses.mean()
        return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss), host_call=(
            lambda loss: LOSSES.append(loss.item()), [loss.reshape(1)]))

    return model_fn


LOSSES: list[float] = []


def train(capture, forward, tmp_path, **arguments):
    LOSSES.clear()
    torch.manual_seed(0)
    state, trainer = run(capture, model_fn_of(forward), Net(), sgd, batches(rows), tmp_path,
                         **{"steps": 60} | arguments)[1:]
    return list(LOSSES), state, trainer


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_on_the_device_is_replayed_with_the_bits_of_tracing(name, tmp_path):
    traced = train("off", BRANCHES[name], tmp_path)
    captured = train("require", BRANCHES[name], tmp_path)
    assert kind(captured[2]) == "replay"
    assert_same(traced, captured)


def test_evaluation_and_prediction_branch_too(tmp_path):
    def input_fn(params, mode):
        generator = torch.Generator().manual_seed(4)
        x = torch.randn(64, 4, generator=generator)
        y = torch.randint(0, 3, (64,), generator=generator)
        return list(x.split(8)) if mode == ModeKeys.PREDICT else torch.utils.data.TensorDataset(x, y)

    results = []
    for capture in ("off", "require"):
        trainer = train(capture, by_batch, tmp_path, steps=10)[2]
        loss = trainer.evaluate(input_fn)["loss"]
        results.append((loss, torch.tensor([row["y"].tolist() for row in trainer.predict(input_fn)])))
        assert kind(trainer) == ("replay" if capture == "require" else "traced")
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_a_tensor_of_user_code_is_read_anew(tmp_path):
    flag = {}

    def forward(model, x, step):
        if not flag:
            flag["x"] = torch.ones((), device=x.device)
        return model(x * 2 if flag["x"] > 0 else x)

    class Turn(SessionRunHook):
        def after_run(self, context):
            if context.step == 30:
                flag["x"] = -flag["x"]

    results = []
    for capture in ("off", "require"):
        flag.clear()
        results.append(train(capture, forward, tmp_path, hooks=[Turn()]))
    assert kind(results[1][2]) == "replay"
    assert_same(*results)


def test_a_value_that_is_another_one_each_time_is_not_captured(tmp_path):
    def forward(model, x, step):
        return model(x * x.sum().item())

    with pytest.raises(CaptureError, match=r"reads a value from the device at test_branches.py:\d+"):
        train("require", forward, tmp_path)
    traced, auto = (train(capture, forward, tmp_path) for capture in ("off", "auto"))
    assert kind(auto[2]) == "traced"
    assert_same(traced, auto)


def test_steps_in_one_program_run_one_at_a_time_where_they_branch(tmp_path):
    traced = train("off", by_step, tmp_path)
    captured = train("auto", by_step, tmp_path, steps_per_execution=5)
    assert_same(traced, captured)
    assert kind(captured[2]) == "replay"
