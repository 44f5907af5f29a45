"""A backward pass on the host, before the XLA client starts, makes torch's threads without one for XLA."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys
import torch
from torch import nn
import tpuspec
from tpuspec import CrossShardOptimizer, TPUEstimatorSpec

nn.Linear(1, 1)(torch.ones(1, 1)).sum().backward()

def model_fn(features, mode, params, model, optimizer):
    x = features.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    loss = (slope.norm(dim=1) - 1).square().mean()
    return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss))

trainer = tpuspec.Trainer(
    model_fn, model=nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)), train_batch_size=4,
    optimizer=lambda model, params: torch.optim.SGD(model.parameters(), lr=0.1), model_dir=sys.argv[1],
    config=tpuspec.RunConfig(show_progress=False, capture="require"))
trainer.train(lambda params: [torch.ones(4, 2)] * 12, steps=12)
print("trained", trainer.global_step())
"""


@pytest.mark.slow
def test_model_fn_may_differentiate_after_a_backward_on_the_host(tmp_path):
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, timeout=240,
                          check=False)
    assert "trained 12" in done.stdout, done.stderr[-3000:]
