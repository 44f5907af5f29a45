"""The Llama recipe on a mesh of data and model, against plain PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.recipes.test_llama import PARAMS
from tests.spmd.test_spmd import part_shapes
from tpuspec import RunConfig, TPUConfig, Trainer
from tpuspec.recipes import llama


def batches(params):
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        text = torch.randint(0, 256, (8, 9), generator=generator)
        yield text[:, :-1], text[:, 1:]


def sgd(model, params):
    # Not AdamW, whose first updates are the signs of gradients: those that are nearly 0 have either one.
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def trained(folder, *, use_tpu=True, **tpu):
    """Trains, and returns the Trainer, its weights and its evaluation."""
    trainer = Trainer(
        llama.model_fn, model=llama.model, optimizer=sgd, model_dir=folder, use_tpu=use_tpu,
        params=PARAMS | {"remat": True, "width": 32, "head_width": 8, "mlp_width": 48, "tied_head": False},
        train_batch_size=8, eval_batch_size=8, eval_on_tpu=use_tpu, config=RunConfig(
            seed=1, show_progress=False, capture="require" if use_tpu else "auto", save_checkpoints_steps=4,
            tpu_config=TPUConfig(**tpu)))
    trainer.train(batches, steps=4)
    metrics = trainer.evaluate(batches)
    return trainer, {name: trainer.get_variable_value(name) for name in trainer.get_variable_names()}, metrics


def test_a_mesh_of_data_and_model_with_fsdp_trains_as_plain_pytorch_does(tmp_path):
    _, expected, judged = trained(tmp_path / "plain", use_tpu=False)
    trainer, found, metrics = trained(
        tmp_path / "mesh", mesh={"data": 4, "model": 2}, sharding=llama.SHARDING, fsdp=True)
    assert metrics["perplexity"] == pytest.approx(judged["perplexity"], rel=1e-5)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=2e-5, err_msg=name)
    module = trainer._sessions[True].module
    parts = {"self_attn.q_proj": (32, 32), "self_attn.o_proj": (32, 32), "mlp.up_proj": (48, 32),
             "mlp.down_proj": (32, 48)}
    for name, (rows, columns) in parts.items():
        weight = module.get_parameter(f"model.layers.1.{name}.weight")
        (shape,) = part_shapes(trainer, weight)
        assert np.prod(shape) * 8 == rows * columns, name
