"""A host_call that is slower than the device holds training back, and fills no memory."""

from __future__ import annotations

import logging
import time

import psutil
import pytest
import torch

from tests.models import make_config, make_spec, make_trainer
from tpuspec import TPUConfig

NUM_STEPS = 500
QUEUE_SIZE = 4
FLOATS_A_STEP = 250_000  # a megabyte: a queue without bound would hold hundreds of them


@pytest.mark.slow
def test_a_host_call_of_50_ms_a_step_keeps_memory_flat_and_every_call_is_made_in_order(tmp_path, caplog):
    process, seen, resident = psutil.Process(), [], []

    def host_call(step, large):
        time.sleep(0.05)
        seen.append(int(step[0]))
        resident.append(process.memory_info().rss)

    def model_fn(features, labels, mode, params, model, optimizer, global_step):
        large = torch.zeros(FLOATS_A_STEP, device=features.device) + global_step
        return make_spec(mode, model(features), labels, optimizer, host_call=(host_call, [global_step, large]))

    trainer = make_trainer(tmp_path, model_fn, config=make_config(
        host_queue_size=QUEUE_SIZE, save_checkpoints_secs=None, tpu_config=TPUConfig(iterations_per_loop=50)))
    with caplog.at_level(logging.WARNING, "tpuspec"):
        trainer.train(lambda params: [(torch.ones(2, 1), torch.zeros(2, 1))] * NUM_STEPS, steps=NUM_STEPS)
    assert seen == list(range(NUM_STEPS))
    assert max(resident[50:]) - min(resident[50:]) < 100 * 2 ** 20
    told = [message for message in caplog.messages if "host work is slower than the device" in message]
    assert len(told) == 1 and "% of the time" in told[0]
