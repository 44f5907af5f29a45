"""Several steps in one program: bit-equal to one at a time, and nothing is lost where the input or the run ends."""

from __future__ import annotations

import itertools
import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.tracer.test_capture import (
    BATCH,
    RECORDED,
    TiedText,
    adamw,
    assert_same,
    batches,
    changing_behind,
    classify,
    conv_net,
    gan,
    gan_model,
    images,
    images_of_mode,
    kind,
    rows,
    run,
    sgd,
    text,
)
from tpuspec import RunConfig, SessionRunHook, TPUConfig, Trainer
from tpuspec.errors import CaptureError, ConfigError, NonFiniteLossError, SpecError
from tpuspec.tracer.several_steps import SeveralSteps


@pytest.fixture
def sizes(monkeypatch):
    """Notes how many steps each program had."""
    noted: list[int] = []
    one, several = SeveralSteps.__call__, SeveralSteps.run_several

    def note_one(self, batches, micro_step=0):
        noted.append(1)
        return one(self, batches, micro_step)

    def note_several(self, batches, after_each):
        outputs = several(self, batches, after_each)
        if outputs is not None:
            noted.append(len(batches))
        return outputs

    monkeypatch.setattr(SeveralSteps, "__call__", note_one)
    monkeypatch.setattr(SeveralSteps, "run_several", note_several)
    return noted


def gan_optimizers(model, params):
    return {"critic": torch.optim.Adam(model["critic"].parameters(), lr=1e-2),
            "generator": torch.optim.SGD(model["generator"].parameters(), lr=1e-2, momentum=0.9)}


def cosine(optimizer, params):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)


PARITY = {
    "conv, BatchNorm, dropout, AdamW": (classify, conv_net, adamw, images, {}),
    "text, tied and frozen weights, dropout, clipping, schedule": (
        classify, TiedText, adamw, text, {"params": {"minimize": {"clip_grad_norm": 0.5}}, "scheduler": cosine}),
    "SGD with momentum and schedule": (classify, lambda: nn.Linear(4, 3), sgd, rows, {"scheduler": cosine}),
    "two optimizers and noise": (gan, gan_model, gan_optimizers, rows, {}),
}


@pytest.mark.parametrize("case", PARITY)
def test_several_steps_in_one_program_have_the_bits_of_single_ones(case, sizes, tmp_path):
    model_fn, make_model, optimizer, make_batch, arguments = PARITY[case]
    torch.manual_seed(0)
    model = make_model()
    alone = run("require", model_fn, model, optimizer, batches(make_batch), tmp_path, **arguments)
    together = run("require", model_fn, model, optimizer, batches(make_batch), tmp_path, steps_per_execution=4,
                   **arguments)
    assert kind(together[2]) == "replay"
    # Between two audits, every 9th step or so, two programs of 4 have room; convolutions are slow in a loop on a CPU.
    assert sizes.count(4) >= (0 if "conv" in case else 4)
    assert ("conv" in case) == (4 not in sizes)
    assert sum(sizes) == 50
    assert_same(alone, together)


def test_the_last_steps_of_the_input_run_one_at_a_time(sizes, tmp_path):
    def input_fn(params):
        return itertools.islice(batches(rows)(params), 23)

    model = nn.Linear(4, 3)
    alone = run("auto", classify, model, sgd, input_fn, tmp_path, steps=99, loop=100)
    together = run("auto", classify, model, sgd, input_fn, tmp_path, steps=99, loop=100, steps_per_execution=5)
    assert sum(sizes) == len(together[0]) == 23
    assert sizes[-1] == 1
    assert 5 in sizes
    assert_same(alone, together)


def test_the_steps_before_an_error_of_the_input_are_made(sizes, tmp_path):
    def input_fn(params):
        yield from itertools.islice(batches(rows)(params), 22)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        run("auto", classify, nn.Linear(4, 3), sgd, input_fn, tmp_path, loop=100, steps_per_execution=5)
    assert sum(sizes) == len(RECORDED) == 22
    assert 5 in sizes


def test_a_resumed_run_stands_behind_the_last_step_of_a_program(sizes, tmp_path):
    def input_fn(params):
        generator = torch.Generator().manual_seed(1)
        return torch.utils.data.TensorDataset(torch.randn(80, 4, generator=generator),
                                              torch.randint(0, 3, (80,), generator=generator))

    def make(folder, num_steps):
        torch.manual_seed(0)
        return Trainer(classify, model=nn.Linear(4, 3), optimizer=sgd, scheduler=cosine, train_batch_size=BATCH,
                          eval_batch_size=BATCH, model_dir=tmp_path / folder, config=RunConfig(
                              seed=5, show_progress=False, save_checkpoints_steps=20, tpu_config=TPUConfig(
                                  iterations_per_loop=20, steps_per_execution=num_steps)))

    one = make("one", 1)
    one.train(input_fn, steps=60)
    make("several", 4).train(input_fn, steps=40)
    several = make("several", 4)
    several.train(input_fn, steps=20)
    assert 4 in sizes
    for name, value in one._sessions[True].model_state().items():
        assert torch.equal(value, several._sessions[True].model_state()[name]), name


def test_a_signal_between_two_programs_saves_the_last_finished_step(sizes, tmp_path):
    def input_fn(params):
        for number, batch in enumerate(batches(rows)(params)):
            if number == 29:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    trainer = Trainer(classify, model=nn.Linear(4, 3), optimizer=sgd, train_batch_size=BATCH, model_dir=tmp_path,
                      config=RunConfig(seed=5, show_progress=False, allow_inexact_resume=True, tpu_config=TPUConfig(
                          iterations_per_loop=100, steps_per_execution=4)))
    RECORDED.clear()
    with pytest.raises(SystemExit, match="143"):
        trainer.train(input_fn, steps=200)
    assert 4 in sizes
    assert 26 <= len(RECORDED) <= 29
    assert Path(trainer.latest_checkpoint()).name == f"checkpoint-{len(RECORDED)}"


def test_a_loss_that_is_not_finite_is_found_at_its_step(sizes, tmp_path):
    def input_fn(params):
        for number, (features, labels) in enumerate(itertools.islice(batches(rows)(params), 60)):
            yield (features * float("nan") if number == 37 else features), labels

    with pytest.raises(NonFiniteLossError, match="step 38"):
        run("auto", classify, nn.Linear(4, 3), sgd, input_fn, tmp_path, loop=20, steps_per_execution=4)
    assert 4 in sizes


def test_accumulated_gradients_are_refused_before_the_first_step(tmp_path):
    with pytest.raises(SpecError, match="accumulate_steps=2 makes an update of several batches, and "
                                        "steps_per_execution=4 a program of several updates"):
        run("auto", classify, nn.Linear(4, 3), sgd, batches(rows), tmp_path, steps=20, steps_per_execution=4,
            params={"minimize": {"accumulate_steps": 2}})


def test_steps_that_are_all_traced_are_refused():
    with pytest.raises(ConfigError, match="steps_per_execution=4 needs a captured step, and capture=off traces"):
        RunConfig(capture="off", tpu_config=TPUConfig(steps_per_execution=4, iterations_per_loop=8))


def test_loops_that_are_shorter_than_a_program_are_refused():
    with pytest.raises(ConfigError, match="iterations_per_loop=2 is shorter than steps_per_execution=4"):
        TPUConfig(steps_per_execution=4)


COUNTER = {"calls": 0}


def counting(features, labels, mode, params, model, optimizer):
    COUNTER["calls"] += 1
    return classify(features * (2.0 if COUNTER["calls"] % 3 == 0 else 1.0), labels, mode, params, model, optimizer)


def test_a_step_that_cannot_be_captured_runs_one_at_a_time(sizes, tmp_path):
    model = nn.Linear(4, 3)
    COUNTER["calls"] = 0
    alone = run("off", counting, model, sgd, batches(rows), tmp_path, steps=30)
    COUNTER["calls"] = 0
    together = run("auto", counting, model, sgd, batches(rows), tmp_path, steps=30, steps_per_execution=4)
    assert set(sizes) == {1}
    assert kind(together[2]) == "traced"
    assert_same(alone, together)


def test_hooks_run_between_loops_and_summaries_have_every_step(sizes, tmp_path):
    seen = []

    class Note(SessionRunHook):
        def after_run(self, context):
            seen.append(context.step)

    run("auto", classify, nn.Linear(4, 3), sgd, batches(rows), tmp_path, loop=12, steps=36, steps_per_execution=4,
        hooks=[Note()], config={"save_summary_steps": 1})
    assert seen == [12, 24, 36]
    assert 4 in sizes
    (folder,) = tmp_path.iterdir()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["name"] == "loss"] == list(range(1, 37))


def test_a_program_that_changed_is_found_by_an_audit(sizes, tmp_path):
    def input_fn(params):
        for number, batch in enumerate(batches(rows)(params)):
            sys.modules["sly"].scale = 2.0 if number >= 40 else 1.0
            yield batch

    with changing_behind(1000) as (model_fn, _), pytest.raises(
            CaptureError, match="the step is no longer what was captured: a number in it changes"):
        run("auto", model_fn, nn.Linear(4, 3), sgd, input_fn, tmp_path, loop=160, steps=160, steps_per_execution=4)
    assert 4 in sizes


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "4"])
def test_a_number_of_steps_that_is_none_is_refused(value):
    with pytest.raises(ConfigError, match="steps_per_execution must be a positive int"):
        TPUConfig(steps_per_execution=value)


def test_evaluation_and_prediction_go_on_as_before(tmp_path):
    torch.manual_seed(0)
    model = conv_net()
    one, several = (run("require", classify, model, adamw, images_of_mode, tmp_path, steps=20,
                        steps_per_execution=number)[2] for number in (1, 4))
    assert one.evaluate(images_of_mode) == several.evaluate(images_of_mode)
    one.train(images_of_mode, steps=20)
    several.train(images_of_mode, steps=20)
    for name, value in one._sessions[True].model_state().items():
        assert torch.equal(value, several._sessions[True].model_state()[name]), name
