"""The GPT of tpuspec/recipes/gpt_bytes, captured and traced: the same bits in training and in sampling."""

from __future__ import annotations

import pytest
import torch

from tests.tracer.test_capture import BATCH, assert_same, batches, classify, kind, run, text
from tpuspec import ModeKeys
from tpuspec.recipes import gpt_bytes

NUM_STEPS = 50
PARAMS = {"length": 8, "width": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.1, "num_samples": BATCH,
          "learning_rate": 0.01, "weight_decay": 0.1, "warm_up_steps": 5, "schedule_steps": NUM_STEPS,
          "temperature": 0.8, "sample_bytes": 16, "minimize": {"clip_grad_norm": 0.5, "accumulate_steps": 2}}


def model_fn(features, labels, mode, params, model, optimizer, global_step):
    if mode == ModeKeys.PREDICT:
        return gpt_bytes.model_fn(features, labels, mode, params, model, optimizer, global_step)
    return classify(features, labels, mode, params, model, optimizer)


def input_fn(params, mode):
    return batches(text)(params) if mode == ModeKeys.TRAIN else gpt_bytes.input_fn(params, mode)


@pytest.mark.slow
def test_gpt_with_cosine_schedule_clipping_accumulation_and_dropout_has_the_bits_of_tracing(tmp_path):
    torch.manual_seed(0)
    model = gpt_bytes.model(PARAMS)
    runs = [run(capture, model_fn, model, gpt_bytes.optimizer, input_fn, tmp_path, params=PARAMS, steps=NUM_STEPS,
                scheduler=gpt_bytes.scheduler) for capture in ("off", "require")]
    traced, captured = runs
    assert (kind(traced[2]), kind(captured[2])) == ("traced", "replay")
    assert len(traced[0]) == 2 * NUM_STEPS
    assert traced[0][-1] < traced[0][0]
    assert_same(traced, captured)
    rates = [trainer._sessions[True].replicas[0].optimizers[""].param_groups[0]["lr"] for _, _, trainer in runs]
    assert rates[0] == rates[1] == pytest.approx(0.1 * PARAMS["learning_rate"])  # the last of the cosine

    # Each sampling step reads the window that the one before it wrote, in place and on the device.
    samples = [[[int(row["byte"]) for row in trainer.predict(input_fn)] for _ in range(2)] for _, _, trainer in runs]
    assert kind(captured[2]) == "replay"
    assert samples[0] == samples[1]
    first, again = samples[1]
    assert first == again  # a new start forgets the last one
    assert len(first) == BATCH * PARAMS["sample_bytes"]
    assert len(set(first)) > 1
    window = captured[2]._sessions[True].module.window.cpu()
    assert window.flatten().tolist() == [byte for i in range(BATCH) for byte in first[i::BATCH][-PARAMS["length"]:]]
