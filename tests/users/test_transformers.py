"""BERT and GPT-2 of transformers, where it is there: with masks they are captured, and train as in plain PyTorch."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch_xla  # noqa: F401 - transformers would import it, which sets an environment variable

from tpuspec import CrossShardOptimizer, RunConfig, TPUConfig, TPUEstimatorSpec, Trainer

pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from step_contenders import transformers_models as models

NUM_STEPS = 40


def train(name, folder, *, dropout, **config):
    losses = []

    def model_fn(features, labels, mode, params, model, optimizer):
        loss = models.loss_of(model, features, labels)
        return TPUEstimatorSpec(
            mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss, clip_grad_norm=models.CLIP_NORM),
            host_call=(lambda loss: losses.append(float(loss[0])), [loss.reshape(1)]))

    use_tpu = config.pop("use_tpu", True)
    Trainer(model_fn, model=models.build(name, dropout), optimizer=models.make_optimizer,
            scheduler=models.make_schedule, model_dir=str(folder), train_batch_size=models.BATCH_SIZE, use_tpu=use_tpu,
            config=RunConfig(seed=0, show_progress=False, save_checkpoints_secs=None, **config,
                             tpu_config=TPUConfig(iterations_per_loop=NUM_STEPS))).train(
        lambda params: itertools.islice(itertools.cycle(models.batches(name)), NUM_STEPS), steps=NUM_STEPS)
    return losses


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_model_of_transformers_is_captured_and_trains_as_plain_pytorch_does(name, tmp_path):
    plain = train(name, tmp_path / "plain", dropout=0.0, use_tpu=False)
    traced = train(name, tmp_path / "traced", dropout=0.0, capture="off")
    captured = train(name, tmp_path / "captured", dropout=0.0, capture="require")
    assert captured == traced
    assert captured == pytest.approx(plain, abs=2e-5)
    mixed = train(name, tmp_path / "mixed", dropout=0.1, capture="require", precision="bf16-mixed")
    assert mixed[0] == pytest.approx(plain[0], rel=0.05)
    assert mixed[-1] < mixed[0]
