"""The Trainer against a hand-written torch_xla loop, which another compiler builds: the same but for rounding."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torch_xla
import torch_xla.core.xla_model as xm
from torch import nn

import tpuspec
from tpuspec.tracer.formulas import register_formulas

NUM_STEPS, SEED = 12, 7


def conv_net() -> nn.Module:
    # No bias before the BatchNorm: its gradient is rounding alone, which AdamW makes steps of.
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                         nn.Dropout(0.2), nn.Linear(256, 10))


OPTIMIZERS = {
    "sgd": lambda module, params: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda module, params: torch.optim.AdamW(module.parameters(), lr=1e-3),
}


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 1, 8, 8, generator=generator), torch.randint(0, 10, (16,), generator=generator))
            for _ in range(4)]


def run_by_hand(module, make_optimizer, batches, clip_grad_norm):
    device = torch_xla.device()
    register_formulas()  # torch_xla's running_var is another one
    module = module.to(device)
    module.train()
    optimizer = make_optimizer(module, {})
    torch_xla.sync(wait=True)
    xm.set_rng_state(SEED, str(device))
    losses = []
    for k in range(NUM_STEPS):
        x, y = (t.to(device) for t in batches[k % 4])
        loss = F.cross_entropy(module(x), y)
        # Earlier tests may have run a backward on the CPU: torch then has no thread for XLA devices.
        with torch.autograd.set_multithreading_enabled(False):
            loss.backward()
        if clip_grad_norm is not None:
            xm.reduce_gradients(optimizer)
            nn.utils.clip_grad_norm_(module.parameters(), clip_grad_norm)
            optimizer.step()
        else:
            xm.optimizer_step(optimizer)
        optimizer.zero_grad()
        loss = loss.detach()
        torch_xla.sync()
        losses.append(loss.item())
    return losses, {name: t.cpu() for name, t in module.state_dict().items()}


def run_by_trainer(module, make_optimizer, batches, clip_grad_norm, model_dir):
    losses = []

    def model_fn(features, labels, mode, params, model, optimizer):
        loss = F.cross_entropy(model(features), labels)
        train_op = tpuspec.CrossShardOptimizer(optimizer).minimize(loss, clip_grad_norm=clip_grad_norm)
        return tpuspec.TPUEstimatorSpec(
            mode, loss=loss, train_op=train_op, host_call=(lambda loss: losses.append(loss.item()), [loss.reshape(1)]))

    trainer = tpuspec.Trainer(
        model_fn, model=module, optimizer=make_optimizer, model_dir=model_dir, train_batch_size=16,
        config=tpuspec.RunConfig(seed=SEED, show_progress=False, tpu_config=tpuspec.TPUConfig(iterations_per_loop=5)))
    trainer.train(lambda params: [batches[k % 4] for k in range(NUM_STEPS)], max_steps=NUM_STEPS)
    return losses, {name: t.cpu() for name, t in module.state_dict().items()}


@pytest.mark.parametrize("clip_grad_norm", [None, 0.5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_losses_and_weights_are_those_of_a_hand_written_loop(optimizer, clip_grad_norm, batches, tmp_path):
    torch.manual_seed(0)
    module = conv_net()
    expected_losses, expected_state = run_by_hand(
        copy.deepcopy(module), OPTIMIZERS[optimizer], batches, clip_grad_norm)

    losses, state = run_by_trainer(module, OPTIMIZERS[optimizer], batches, clip_grad_norm, tmp_path)

    assert losses == pytest.approx(expected_losses, rel=1e-6, abs=1e-6)
    assert len(set(losses)) > NUM_STEPS // 2, "the run must move"
    for name, tensor in expected_state.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=2e-6, msg=name)
