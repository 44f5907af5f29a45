from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tpuspec import Trainer
from tpuspec.config import RunConfig, TPUConfig
from tpuspec.drain.drain import Drain
from tpuspec.drain.executor import HostExecutor
from tpuspec.drain.metric_state import MetricState
from tpuspec.errors import SpecUsageError
from tpuspec.loops.evaluate import EvaluateLoop
from tpuspec.loops.hooks import HookRunner
from tpuspec.loops.host_work import EvalWork
from tpuspec.loops.interruption import Interruption
from tpuspec.loops.model_source import ModelSource
from tpuspec.loops.prepare import Preparation, Prepared
from tpuspec.loops.session import Session
from tpuspec.spec.backend import Backend, CompiledStep, Replica
from tpuspec.spec.estimator_spec import TPUEstimatorSpec
from tpuspec.spec.hooks import HookContext
from tpuspec.spec.mode import ModeKeys
from tpuspec.spec.results import Batch, StepOutput
from tpuspec.spec.train_op import CrossShardOptimizer
from tpuspec.summary.progress import Progress
from tpuspec.testing import (
    FakeBackend,
    MemoryWriter,
    linear_input_fn,
    linear_model,
    linear_model_fn,
    linear_optimizer,
    linear_rows,
)


def prepare(backend: FakeBackend, mode: ModeKeys, batch_size: int, *, num_rows: int = 8,
            model_fn: Callable[..., Any] = linear_model_fn, deployment: object = True) -> tuple[Session, Prepared]:
    session = Session(backend, ModelSource(model=linear_model, optimizer=linear_optimizer, params={}), seed=0)
    session.ensure_optimizers()
    session.set_training(mode is ModeKeys.TRAIN)
    config = RunConfig(tpu_config=TPUConfig(per_host_input_for_training=deployment))
    preparation = Preparation(model_fn=model_fn, params={}, config=config, session=session, mode=mode,
                              global_batch_size=batch_size, on_xla=True, seed=0)
    return session, preparation.run(linear_input_fn(num_rows))


def evaluate(num_replicas: int, batch_size: int, *, num_rows: int, model_fn: Callable[..., Any] = linear_model_fn,
             deployment: object = True) -> tuple[float, dict[str, Any]]:
    """Evaluates zero weights; returns the loss and the metrics."""
    backend = FakeBackend(num_replicas)
    _, prepared = prepare(backend, ModeKeys.EVAL, batch_size, num_rows=num_rows, model_fn=model_fn,
                          deployment=deployment)
    writer, metrics = MemoryWriter(), MetricState()
    work = EvalWork(writer=writer, metrics=metrics, progress=Progress(enabled=False), step_kind="eager", global_step=0)
    with HostExecutor() as executor:
        EvaluateLoop(backend=backend, step=prepared.step, batches=prepared.batches, interruption=Interruption(1.0),
                     drain=Drain(backend.fetch, executor, work=work, copies=prepared.copies),
                     hooks=HookRunner((), HookContext(mode=ModeKeys.EVAL), writer=writer)).run()
    return work.loss.compute(), metrics.compute()


@pytest.mark.parametrize("deployment", [True, "PER_HOST_V2", "BROADCAST"])
@pytest.mark.parametrize("num_rows", [1, 5, 8, 11, 24])
@pytest.mark.parametrize(("num_replicas", "batch_size"), [(1, 3), (2, 8), (4, 8), (3, 6), (4, 4)])
def test_loss_and_metrics_over_replicas_equal_those_over_the_whole_set(num_replicas, batch_size, num_rows, deployment):
    loss, metrics = evaluate(num_replicas, batch_size, num_rows=num_rows, deployment=deployment)
    expected = linear_rows(num_rows)[1].double().square().mean().item()
    assert loss == pytest.approx(expected, rel=1e-6)
    assert metrics["error"] == pytest.approx(expected, rel=1e-6)


def scalar_loss_model_fn(features, labels, mode, params, model):
    return TPUEstimatorSpec(mode=mode, loss=(model(features) - labels).square().mean())


@pytest.mark.parametrize("num_rows", [4, 5, 6, 7, 8])
def test_a_scalar_loss_is_exact_where_each_replica_has_one_row(num_rows):
    loss, _ = evaluate(4, 4, num_rows=num_rows, model_fn=scalar_loss_model_fn)
    assert loss == pytest.approx(linear_rows(num_rows)[1].double().square().mean().item(), rel=1e-6)


def test_the_verbs_of_a_step_are_noted_in_the_order_of_their_calls():
    backend = FakeBackend(num_replicas=2)
    _, prepared = prepare(backend, ModeKeys.EVAL, 4)
    batch = next(prepared.batches)
    prepared.step(backend.feed(batch.replicas))
    prepared.step.publish()
    backend.fetch([])
    assert backend.events == ["seed", "place", "feed", "rehearse", "feed", "step", "publish", "fetch"]
    assert [len(replicas) for replicas in backend.fed] == [2, 2]
    assert backend.fed[1][1].features is batch.replicas[1].features


def test_one_replica_trains():
    backend = FakeBackend(num_replicas=1)
    session, prepared = prepare(backend, ModeKeys.TRAIN, 4)
    losses = []
    for _, batch in zip(range(100), prepared.batches, strict=False):
        (output,) = prepared.step(backend.feed(batch.replicas))
        losses.append(output.tensors["loss"].item())
    prepared.batches.close()
    assert losses[-1] < 0.01 * losses[0]
    assert session.replicas[0].global_step.tolist() == [100]
    assert backend.events.count("reduce_gradients") == 100


def test_several_replicas_refuse_to_train():
    backend = FakeBackend(num_replicas=2)
    _, prepared = prepare(backend, ModeKeys.TRAIN, 4)
    with pytest.raises(SpecUsageError, match="its 2 replicas one after the other and cannot reduce gradients over"):
        prepared.step(backend.feed(next(prepared.batches).replicas))
    assert "reduce_gradients" not in backend.events


def test_gather_needs_one_replica():
    tensor = torch.ones(2)
    assert FakeBackend(num_replicas=1).gather(tensor) is tensor
    with pytest.raises(SpecUsageError, match="cannot gather over them"):
        FakeBackend(num_replicas=2).gather(tensor)


def test_replicas_have_equal_modules_of_their_own_whose_ties_are_kept():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    replicas = FakeBackend(num_replicas=3).place(module)
    assert [replica.ordinal for replica in replicas] == [0, 1, 2]
    assert replicas[0].model is module
    assert replicas[1].model is not replicas[2].model
    for replica in replicas:
        assert replica.model[0].weight is replica.model[1].weight
        assert torch.equal(replica.model[0].weight, module[0].weight)
    assert [replica.model for replica in FakeBackend(num_replicas=2).place(None)] == [None, None]


def test_feed_and_fetch_copy_as_a_transfer_does():
    backend, tensor = FakeBackend(num_replicas=1), torch.ones(2, requires_grad=True)
    (fed,) = backend.feed([Batch(features={"x": tensor.detach()})])
    fetched = backend.fetch({"y": [tensor], "text": "kept"})
    with torch.no_grad():
        tensor.zero_()
    assert fed.features["x"].tolist() == [1, 1]
    assert fetched["y"][0].tolist() == [1, 1]
    assert not fetched["y"][0].requires_grad
    assert fetched["text"] == "kept"


def test_rehearse_puts_buffers_and_random_state_back():
    backend = FakeBackend(num_replicas=1)
    (replica,) = backend.place(nn.BatchNorm1d(3))
    before = torch.get_rng_state()
    backend.rehearse(replica, lambda: replica.model(torch.randn(4, 3)))
    assert replica.model.num_batches_tracked.item() == 0
    assert replica.model.running_mean.tolist() == [0, 0, 0]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_seed_repeats_random_numbers_and_a_state_puts_them_back():
    backend = FakeBackend()
    backend.seed(3)
    state, first = backend.rng_state(), torch.rand(2)
    backend.seed(3)
    assert torch.equal(torch.rand(2), first)
    backend.set_rng_state(state)
    assert torch.equal(torch.rand(2), first)


@pytest.mark.parametrize("static_shapes", [True, False])
def test_the_topology_is_one_host_with_the_asked_replicas(static_shapes):
    backend: Backend = FakeBackend(num_replicas=3, static_shapes=static_shapes)
    assert (backend.topology.num_replicas, backend.topology.num_hosts, backend.topology.is_chief) == (3, 1, True)
    assert backend.static_shapes is static_shapes
    assert backend.step_kind == "eager"


def test_a_cross_shard_optimizer_reaches_the_backend_from_within_the_step():
    backend = FakeBackend(num_replicas=1)
    replicas = backend.place(linear_model({}))
    optimizer = CrossShardOptimizer(linear_optimizer(replicas[0].model, {}))

    def step(replica: Replica, batch: Batch, micro_step: int) -> StepOutput:
        replica.model(batch.features).sum().backward()
        optimizer.step()
        return StepOutput(tensors={})

    compiled: CompiledStep = backend.compile_step(step, replicas)
    compiled([Batch(features=torch.ones(2, 3))])
    assert backend.events == ["place", "step", "reduce_gradients"]
    assert replicas[0].model.bias.item() == pytest.approx(-0.2)


@pytest.mark.parametrize("deployment", [True, "PER_HOST_V2", "BROADCAST"])
def test_a_trainer_on_the_fake_backend_tells_host_call_of_every_batch_of_an_update(tmp_path, monkeypatch, deployment):
    monkeypatch.setattr("tpuspec.trainer.select", lambda config, use_tpu: FakeBackend(num_replicas=1))
    told: list[list[float]] = []

    def model_fn(features, labels, mode, params, model, optimizer):
        loss = (model(features) - labels).square().mean()
        return TPUEstimatorSpec(mode=mode, loss=loss, host_call=(lambda sums: told.append(sums.tolist()), [
            features.sum().reshape(1)]), train_op=CrossShardOptimizer(optimizer).minimize(loss, accumulate_steps=2))

    def input_fn(params):
        return ((torch.full((2, 3), value), torch.zeros(2, 1)) for value in (1.0, 2.0, 3.0, 4.0))

    config = RunConfig(show_progress=False, tpu_config=TPUConfig(per_host_input_for_training=deployment))
    trainer = Trainer(model_fn, model=linear_model, optimizer=linear_optimizer, params={}, train_batch_size=2,
                      model_dir=tmp_path, config=config)
    trainer.train(input_fn, max_steps=2)
    assert told == [[6.0, 12.0], [18.0, 24.0]]
