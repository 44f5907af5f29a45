"""Audits say nothing where nothing has changed: buffers keep their names, and other Trainers' tensors are theirs."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
import torch.nn.functional as F
import torch_xla
from torch import nn

from tpuspec import CrossShardOptimizer, RunConfig, SessionRunHook, TPUConfig, TPUEstimatorSpec, Trainer
from tpuspec.tracer import graph

BATCH = 8


def test_a_buffer_is_named_alike_while_its_program_runs_and_afterwards():
    device = torch_xla.device()
    matrix = torch.randn(600, 600).to(device)
    graph.materialize([matrix], str(device))
    for _ in range(10):
        computed = [matrix @ matrix, matrix @ matrix.T]
        graph.materialize(computed, str(device))
        named = graph.handles(computed)
        torch_xla._XLAC._xla_wait_device_ops([])
        assert graph.handles(computed) == named
        assert len(set(named)) == 2


def model_fn(features, labels, mode, params, model, optimizer):
    losses = F.cross_entropy(model(features), labels, reduction="none")
    if mode == "eval":
        return TPUEstimatorSpec(mode, loss=losses)
    return TPUEstimatorSpec(mode, loss=losses.mean(), host_call=(lambda loss: None, [losses.mean().reshape(1)]),
                            train_op=CrossShardOptimizer(optimizer).minimize(losses.mean()))


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def cnn():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2),
                         nn.Linear(256, 10))


def sgd(model, params):
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def adamw(model, params):
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def input_fn(params):
    generator = torch.Generator().manual_seed(0)
    return itertools.cycle([(torch.randn(BATCH, 1, 8, 8, generator=generator),
                             torch.randint(0, 10, (BATCH,), generator=generator)) for _ in range(3)])


class Scale(SessionRunHook):
    """Writes every weight at each boundary, which leaves it to be computed when the next step begins."""

    def after_run(self, context):
        with torch.no_grad():
            for parameter in context.model.parameters():
                parameter.mul_(1.0)


@pytest.mark.parametrize("hooks", [[], [Scale()]], ids=["alone", "with weights that are pending at boundaries"])
def test_audits_of_many_trainings_of_models_of_equal_shapes_say_nothing(hooks):
    kept = []
    for make, optimizer in [(mlp, sgd), (cnn, adamw), (mlp, adamw), (cnn, adamw)]:
        trainer = Trainer(model_fn, model=make(), optimizer=optimizer, params={}, train_batch_size=BATCH,
                          eval_batch_size=BATCH,
                          config=RunConfig(seed=0, capture="require", audit_every_steps=3, show_progress=False,
                                           tpu_config=TPUConfig(iterations_per_loop=5)))
        kept = [*kept[-1:], trainer]  # the one before lives on, those before it are gone
        gc.collect()
        for _ in range(2):
            trainer.train(input_fn, steps=8, hooks=hooks)
            kept[0].train(input_fn, steps=5, hooks=hooks)
            trainer.evaluate(input_fn, steps=2)
    assert trainer._sessions[True].global_step == 16


def test_what_is_pending_of_another_trainer_is_not_laid_to_the_step_and_keeps_its_value():
    def trainer():
        return Trainer(model_fn, model=mlp(), optimizer=sgd, params={}, train_batch_size=BATCH, config=RunConfig(
            seed=0, capture="require", audit_every_steps=3, show_progress=False,
            tpu_config=TPUConfig(iterations_per_loop=4)))

    other, audited = trainer(), trainer()
    other.train(input_fn, steps=4)
    audited.train(input_fn, steps=5)
    weight = other._sessions[True].replicas[0].model[1].weight
    before = weight.detach().cpu()
    with torch.no_grad():
        weight.mul_(0.5)
    assert graph.pending([weight]) == [True]
    audited.train(input_fn, steps=8)
    assert torch.equal(weight.detach().cpu(), before * 0.5)
