"""What a captured step has read may change: it is captured anew, traced with a message, or an error."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from tests.tracer.test_capture import adamw, assert_same, batches, classify, conv_net, images, kind, rows, run, sgd
from tpuspec import ModeKeys, SessionRunHook
from tpuspec.errors import CaptureError


class At(SessionRunHook):
    """Does something to the model at the loop boundary behind a step."""

    def __init__(self, step, change):
        self._step, self._change = step, change

    def after_run(self, context):
        if context.step == self._step:
            self._change(context.model)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.scale, self.seen = nn.Linear(4, 3), 1.0, 0

    def forward(self, x):
        return self.inner(x) * self.scale


def drop_more(model):
    model[4].p = 0.8


def scale_more(model):
    model.scale = 3.0


def smooth(model):
    model[2] = nn.GELU()


CHANGES = {"the rate of a dropout": (conv_net, images, drop_more), "a module": (conv_net, images, smooth),
           "a module's own attribute": (Scaled, rows, scale_more)}


@pytest.mark.parametrize("case", CHANGES)
def test_what_a_hook_changes_in_a_module_counts_from_the_next_loop_on(case, tmp_path):
    make_model, make_batch, change = CHANGES[case]
    torch.manual_seed(0)
    model = make_model()
    config = {"audit_every_steps": 1000}
    traced, captured = (run(capture, classify, model, adamw, batches(make_batch), tmp_path, hooks=[At(20, change)],
                            config=config) for capture in ("off", "require"))
    assert kind(captured[2]) == "replay"
    assert_same(traced, captured)


def test_an_attribute_that_no_code_of_the_step_names_captures_nothing_anew(tmp_path, caplog):
    def note(model):
        model.accuracy = torch.rand(()).item()

    class Note(SessionRunHook):
        def after_run(self, context):
            note(context.model)

    trainer = run("require", classify, Scaled(), sgd, batches(rows), tmp_path, hooks=[Note()])[2]
    assert kind(trainer) == "replay"
    assert "captured" not in caplog.text


def test_evaluation_sees_what_changed_in_a_module(tmp_path):
    def input_fn(params, mode):
        if mode == ModeKeys.TRAIN:
            return batches(rows)(params)
        generator = torch.Generator().manual_seed(4)
        return torch.utils.data.TensorDataset(torch.randn(21, 4, generator=generator),
                                              torch.randint(0, 3, (21,), generator=generator))

    torch.manual_seed(0)
    model = Scaled()
    losses = []
    for capture in ("off", "auto"):
        trainer = run(capture, classify, model, sgd, input_fn, tmp_path, steps=10)[2]
        first = [trainer.evaluate(input_fn)["loss"] for _ in range(3)]
        trainer._sessions[True].module.scale = 3.0
        losses.append([*first, trainer.evaluate(input_fn)["loss"]])
    assert losses[0] == losses[1]
    assert losses[0][2] != losses[0][3]


def late_momentum(optimizer, params):
    return lr_scheduler.SequentialLR(optimizer, [
        lr_scheduler.LinearLR(optimizer), lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=500)], milestones=[30])


class MomentumOnce(lr_scheduler.LRScheduler):
    """A schedule that halves the momentum at one step."""

    def get_lr(self):
        return [group["lr"] for group in self.optimizer.param_groups]

    def step(self, epoch=None):
        super().step(epoch)
        if self.last_epoch == 33:
            for group in self.optimizer.param_groups:
                group["momentum"] /= 2


@pytest.mark.parametrize("num_at_once", [1, 4])
@pytest.mark.parametrize("schedule", [late_momentum, lambda optimizer, params: MomentumOnce(optimizer)],
                         ids=["cycles from step 30 on", "once"])
def test_what_a_schedule_moves_besides_the_rate_counts_from_its_step_on(schedule, num_at_once, tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    traced = run("off", classify, model, sgd, batches(rows), tmp_path, loop=50, scheduler=schedule)
    captured = run("auto", classify, model, sgd, batches(rows), tmp_path, loop=50, scheduler=schedule,
                   steps_per_execution=num_at_once)
    assert_same(traced, captured)


def one_cycle(optimizer, params):
    return lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=500)


def test_a_number_that_moves_at_every_step_is_one_program(tmp_path, caplog):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    traced = run("off", classify, model, sgd, batches(rows), tmp_path, scheduler=one_cycle)
    captured = run("require", classify, model, sgd, batches(rows), tmp_path, scheduler=one_cycle)
    assert kind(captured[2]) == "replay"
    assert len(captured[2]._sessions[True]._compiled[ModeKeys.TRAIN]._step._programs.kept) == 1
    assert "captured" not in caplog.text
    assert_same(traced, captured)


FACTOR = {"value": 1.0}


def test_a_value_that_the_input_changes_within_a_loop_is_an_error(tmp_path):
    def model_fn(features, labels, mode, params, model, optimizer):
        return classify(features * FACTOR["value"], labels, mode, params, model, optimizer)

    def input_fn(params):
        for number, batch in enumerate(itertools.islice(batches(rows)(params), 50)):
            FACTOR["value"] = 1.0 if number < 33 else 2.0
            yield batch

    with pytest.raises(CaptureError, match="a Python value that the step reads changed.*between two steps of a loop"):
        run("auto", model_fn, nn.Linear(4, 3), sgd, input_fn, tmp_path, config={"audit_every_steps": 1000})


def test_what_a_hook_writes_into_weights_has_the_same_bits_captured_and_traced(tmp_path):
    class Shrink(SessionRunHook):
        def after_run(self, context):
            with torch.no_grad():
                for parameter in context.model.parameters():
                    parameter.mul_(0.3)

    torch.manual_seed(0)
    model = conv_net()
    traced, captured = (run(capture, classify, model, adamw, batches(images), tmp_path, hooks=[Shrink()])
                        for capture in ("off", "require"))
    assert kind(captured[2]) == "replay"
    assert_same(traced, captured)
