"""2, 4 and 8 replicas on XLA:CPU against one on the same global batch."""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from tpuspec import (
    CrossShardOptimizer,
    InputPipelineConfig,
    ModeKeys,
    RunConfig,
    SessionRunHook,
    TPUConfig,
    TPUEstimatorSpec,
    Trainer,
)
from tpuspec.errors import CaptureError, SpecError
from tpuspec.loops.drift import ReplicaDriftError

BATCH = 16
RECORDED: list[list[float]] = []


def model_fn(features, labels, mode, params, model, optimizer, global_step):
    logits = model(features)
    if mode == ModeKeys.PREDICT:
        return TPUEstimatorSpec(mode, predictions={"logits": logits})
    losses = F.cross_entropy(logits, labels, reduction="none")
    if mode == ModeKeys.EVAL:
        return TPUEstimatorSpec(mode, loss=losses, eval_metrics=(
            lambda labels, logits: {"accuracy": logits.argmax(1) == labels}, [labels, logits]))
    loss = losses.mean()
    return TPUEstimatorSpec(
        mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss, **params.get("minimize", {})),
        host_call=(lambda step, loss: RECORDED.append([*step.tolist(), *loss.tolist()]),
                   [global_step, loss.reshape(1)]))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def sgd(model, params):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def rows(num_rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, 6, generator=generator)
    return x, (x[:, :3].argmax(1) + (x[:, 3] > 1).long()) % 3


def input_fn(params, mode):
    if mode == ModeKeys.TRAIN:
        x, y = rows(5 * BATCH)
        return itertools.cycle([(x[i:i + BATCH], y[i:i + BATCH]) for i in range(0, len(x), BATCH)])
    return TensorDataset(*rows(101, seed=1))


def make(num_shards, tmp_path, *, model_fn=model_fn, optimizer=sgd, model=None, params=None, capture="auto", loop=10,
         saves=None, scheduler=None, **arguments):
    return Trainer(
        model_fn, model=model if inspect.isfunction(model) else copy.deepcopy(model or net()), optimizer=optimizer,
        params=params or {}, train_batch_size=BATCH,
        eval_batch_size=BATCH, predict_batch_size=BATCH, model_dir=tmp_path, scheduler=scheduler,
        config=RunConfig(
            seed=3, show_progress=False, capture=capture, **({"save_checkpoints_steps": saves} if saves else {}),
            tpu_config=TPUConfig(iterations_per_loop=loop, num_shards=num_shards, **arguments)))


def weights(trainer):
    return [{name: tensor.detach().cpu() for name, tensor in replica.model.state_dict().items()}
            for replica in trainer._sessions[True].replicas]


def trained(num_shards, tmp_path, steps=50, **arguments):
    RECORDED.clear()
    trainer = make(num_shards, tmp_path, **arguments)
    trainer.train(input_fn, steps=steps)
    return trainer, [row[:] for row in RECORDED], weights(trainer)


@pytest.mark.parametrize("params", [{}, {"minimize": {"clip_grad_norm": 0.1, "accumulate_steps": 2}}],
                         ids=["plain", "clipped and accumulated"])
@pytest.mark.parametrize("num_shards", [2, 4, 8])
def test_replicas_train_as_one_device_does(num_shards, params, tmp_path):
    _, one_records, (one,) = trained(1, tmp_path / "one", params=params)
    trainer, records, all_weights = trained(num_shards, tmp_path / "several", params=params)
    assert trainer._sessions[True].backend.step_kind == "replay"
    num_micro = params.get("minimize", {}).get("accumulate_steps", 1)
    for step, (expected, got) in enumerate(zip(one_records, records, strict=True)):
        assert got[:num_shards] == [step] * num_shards
        np.testing.assert_allclose(np.mean(got[num_shards * num_micro:]), np.mean(expected[num_micro:]), atol=1e-5)
    for replica in all_weights:
        for name, tensor in replica.items():
            assert torch.equal(tensor, all_weights[0][name]), f"replicas differ in {name}"
            torch.testing.assert_close(tensor, one[name], atol=1e-5, rtol=1e-5)


def test_replicas_stay_equal_where_a_schedule_moves_within_a_loop_that_audits_interrupt(tmp_path):
    trainer = make(4, tmp_path, capture="require", loop=20, scheduler=lambda optimizer, params: (
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))))
    trainer.train(input_fn, steps=40)
    first, *others = weights(trainer)
    for replica in others:
        for name, tensor in replica.items():
            assert torch.equal(tensor, first[name]), f"replicas differ in {name}"


def test_copies_of_a_module_have_the_hooks_of_its_parameters(tmp_path):
    def build(params):
        model = net()
        model[0].weight.register_hook(lambda gradient: gradient * 0)
        return model

    _, _, all_weights = trained(4, tmp_path, model=build, steps=20)
    for replica in all_weights:
        assert torch.equal(replica["0.weight"], net().state_dict()["0.weight"])
        assert not torch.equal(replica["0.bias"], net().state_dict()["0.bias"])


@pytest.mark.parametrize("num_shards", [2, 4])
def test_replay_has_the_bits_of_tracing(num_shards, tmp_path):
    _, traced, off = trained(num_shards, tmp_path / "off", capture="off", steps=12)
    _, replayed, on = trained(num_shards, tmp_path / "on", capture="require", steps=12)
    assert traced == replayed
    for name, tensor in off[0].items():
        assert torch.equal(tensor, on[0][name]), name


def test_replicas_branch_on_the_device_where_that_needs_no_other_replica(tmp_path):
    def branching(features, labels, mode, params, model, optimizer, global_step):
        if global_step % 4 == 0:
            features = features * 2
        return model_fn(features, labels, mode, params, model, optimizer, global_step)

    results = []
    for capture in ("off", "require"):
        trainer = make(2, tmp_path / capture, model_fn=branching, capture=capture)
        RECORDED.clear()
        trainer.train(input_fn, steps=40)
        results.append(list(RECORDED))
    assert trainer._sessions[True].backend.step_kind == "replay"
    assert results[0] == results[1]


def test_several_steps_in_one_program_have_the_bits_of_single_ones(tmp_path):
    _, expected, alone = trained(4, tmp_path / "alone", capture="require")
    trainer, records, together = trained(4, tmp_path / "together", capture="require", steps_per_execution=4)
    assert trainer._sessions[True]._compiled[ModeKeys.TRAIN].num_at_once == 4
    assert records == expected
    for one, other in zip(alone, together, strict=True):
        for name, value in one.items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("deployment", ["PER_SHARD_V1", "PER_HOST_V1", "PER_HOST_V2"])
def test_evaluation_and_prediction_are_exact_on_four_replicas(deployment, tmp_path):
    trainer = make(4, tmp_path, per_host_input_for_training=InputPipelineConfig[deployment])
    result = trainer.evaluate(input_fn)
    x, y = rows(101, seed=1)
    logits = net()(x).detach()
    assert result["accuracy"] == pytest.approx((logits.argmax(1) == y).double().mean().item(), abs=0)
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, y).item(), abs=1e-6)
    predicted = np.stack([row["logits"] for row in trainer.predict(input_fn)])
    np.testing.assert_allclose(predicted, logits.numpy(), atol=1e-5)


def test_metrics_that_are_views_leave_all_replicas_graphs_equal(tmp_path):
    def viewing(features, labels, mode, params, model, optimizer, global_step):
        spec = model_fn(features, labels, mode, params, model, optimizer, global_step)
        if mode != ModeKeys.EVAL:
            return spec
        first = model(features)[:, :1].squeeze(1)
        return spec.replace(eval_metrics=(lambda first: {"first": first}, [first]))

    trainer = make(4, tmp_path, model_fn=viewing)
    trainer.train(input_fn, steps=5)
    assert trainer.evaluate(input_fn) == trainer.evaluate(input_fn)


def test_replicas_drop_different_units(tmp_path):
    def dropping(features, labels, mode, params, model, optimizer):
        kept = F.dropout(torch.ones(64, device=features.device), 0.5)
        loss = model(features).square().mean()
        return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss),
                                host_call=(lambda kept: RECORDED.append(kept.tolist()), [kept]))

    RECORDED.clear()
    make(2, tmp_path, model_fn=dropping).train(input_fn, steps=5)
    for kept in RECORDED:
        assert kept[:64] != kept[64:]


def test_fault_30_an_error_on_one_replica_is_that_error_and_nothing_is_launched(tmp_path):
    calls = []

    def failing(features, labels, mode, params, model, optimizer, global_step):
        calls.append(features.device)
        if len(calls) == 3:  # the trace of the second step; the rehearsal is the first call
            raise KeyError("only in one step")
        return model_fn(features, labels, mode, params, model, optimizer, global_step)

    trainer = make(4, tmp_path, model_fn=failing)
    with pytest.raises(KeyError, match="only in one step"):
        trainer.train(input_fn, steps=20)
    assert trainer._sessions[True].global_step == 1
    sums = trainer._sessions[True].backend.sums_of_parameters(trainer._sessions[True].replicas)
    assert len(sums) == 4 and all(torch.equal(one, sums[0]) for one in sums)
    assert not torch.equal(weights(trainer)[0]["0.weight"], net().state_dict()["0.weight"])  # of a completed step


@pytest.mark.parametrize("ask", ["ordinal", "gather"])
def test_a_step_that_asks_which_replica_it_is_is_refused(ask, tmp_path):
    import torch_xla.core.xla_model as xm
    import torch_xla.runtime as xr

    def lopsided(features, labels, mode, params, model, optimizer, global_step):
        if ask == "gather":
            xm.all_gather(features)
        elif xr.global_ordinal() == 1:
            features = features.cos()
        return model_fn(features, labels, mode, params, model, optimizer, global_step)

    with pytest.raises(SpecError, match="asks which replica it is.*pin_layout=False"):
        make(2, tmp_path, model_fn=lopsided).train(input_fn, steps=5)


def test_a_branch_on_a_value_that_differs_between_replicas_is_refused(tmp_path):
    def branching(features, labels, mode, params, model, optimizer, global_step):
        if features.sum() > features.numel():  # of the replica's own rows
            features = features.cos()
        return model_fn(features, labels, mode, params, model, optimizer, global_step)

    def apart(params, mode):
        x, y = rows(BATCH)
        x[:BATCH // 2] = 5.0
        return itertools.repeat((x, y))

    with pytest.raises(CaptureError, match="the replicas computed different graphs.*must do the same"):
        make(2, tmp_path, model_fn=branching).train(apart, steps=5)


def test_a_train_op_that_steps_without_reducing_is_refused_before_anything_runs(tmp_path):
    def stepping_alone(features, labels, mode, params, model, optimizer):
        loss = F.cross_entropy(model(features), labels)

        def train_op():
            loss.backward()
            optimizer.step()

        return TPUEstimatorSpec(mode, loss=loss, train_op=train_op)

    trainer = make(2, tmp_path, model_fn=stepping_alone)
    with pytest.raises(ValueError, match="CrossShardOptimizer must be used.*SGD.step itself"):
        trainer.train(input_fn, steps=5)
    for replica in weights(trainer):
        for name, tensor in replica.items():
            assert torch.equal(tensor, net().state_dict()[name])


@pytest.mark.parametrize("where", ["train_op", "model_fn"])
def test_an_optimizer_that_the_trainer_does_not_know_is_refused_too(where, tmp_path):
    def stepping_another(features, labels, mode, params, model, optimizer):
        loss = F.cross_entropy(model(features), labels)
        own = torch.optim.SGD(model.parameters(), lr=0.1)

        def train_op():
            loss.backward()
            own.step()

        if where == "model_fn":
            train_op()
            return TPUEstimatorSpec(mode, loss=loss, train_op=lambda: None)
        return TPUEstimatorSpec(mode, loss=loss, train_op=train_op)

    with pytest.raises(ValueError, match="CrossShardOptimizer must be used.*SGD.step itself"):
        make(2, tmp_path, model_fn=stepping_another).train(input_fn, steps=5)


def test_an_optimizer_that_reads_its_rate_as_it_makes_its_state_trains(tmp_path):
    def rprop(model, params):
        return torch.optim.Rprop(model.parameters(), lr=0.01)

    def cosine(optimizer, params):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)

    found = [trained(num_shards, tmp_path / str(num_shards), optimizer=rprop, scheduler=cosine, steps=20)
             for num_shards in (1, 2)]
    assert found[1][0]._sessions[True].backend.step_kind == "replay"
    for name, value in found[0][2][0].items():
        torch.testing.assert_close(found[1][2][0][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("capture", ["auto", "off"])
def test_a_read_of_what_replicas_have_for_themselves_is_refused_with_its_line(capture, tmp_path):
    def reading(features, labels, mode, params, model, optimizer, global_step):
        features.cpu()
        return model_fn(features, labels, mode, params, model, optimizer, global_step)

    with pytest.raises(CaptureError, match=r"cannot run on several devices: it reads .* at test_replicas\.py:\d+"):
        make(2, tmp_path, model_fn=reading, capture=capture).train(input_fn, steps=5)


def test_reading_a_value_after_the_reduction_is_an_error_not_a_hang(tmp_path):
    def reading(features, labels, mode, params, model, optimizer):
        loss = model(features).square().mean()

        def train_op():
            loss.backward()
            CrossShardOptimizer(optimizer).step()
            next(model.parameters()).sum().item()
            optimizer.zero_grad()

        return TPUEstimatorSpec(mode, loss=loss, train_op=train_op)

    with pytest.raises(RuntimeError, match="Unexpected execution"):
        make(2, tmp_path, model_fn=reading).train(input_fn, steps=5)


def test_a_hook_may_set_the_first_replicas_learning_rate_for_all(tmp_path):
    class Lower(SessionRunHook):
        def after_run(self, context):
            for group in trainer._sessions[True].replicas[0].optimizers[""].param_groups:
                group["lr"] = 0.0 if context.step >= 20 else 0.1

    trainer = make(2, tmp_path)
    trainer.train(input_fn, steps=20, hooks=[Lower()])
    before = weights(trainer)
    trainer.train(input_fn, steps=10, hooks=[Lower()])
    for name, tensor in before[0].items():
        assert torch.equal(weights(trainer)[0][name], tensor)


def test_a_hook_may_freeze_and_unfreeze_layers_and_add_groups_on_the_first_replica_for_all(tmp_path):
    class Turn(SessionRunHook):
        def after_run(self, context):
            if context.step == 10:
                context.model[0].requires_grad_(True)
                made[0].add_param_group({"params": list(context.model[0].parameters()), "lr": 0.02})
            if context.step == 20:
                context.model[2].requires_grad_(False)

    def frozen(params):
        model = net()
        model[0].requires_grad_(False)
        return model

    def last_layer(model, params):
        made.append(torch.optim.SGD(model[2].parameters(), lr=0.1))
        return made[-1]

    found = []
    for num_shards in (1, 2):
        made: list[torch.optim.Optimizer] = []
        trainer = make(num_shards, tmp_path / str(num_shards), model=frozen, optimizer=last_layer)
        trainer.train(input_fn, steps=30, hooks=[Turn()])
        found.append(trainer._sessions[True].model_state())
        sums = trainer._sessions[True].backend.sums_of_parameters(trainer._sessions[True].replicas)
        assert len(sums) == num_shards and all(torch.equal(one, sums[0]) for one in sums)
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduces", [False, True])
def test_replicas_that_drift_apart_are_told_of_by_the_name_of_the_first_weight(reduces, tmp_path):
    def by_hand(features, labels, mode, params, model, optimizer):
        """Steps without an optimizer, which nothing sees."""
        loss = F.cross_entropy(model(features), labels)

        def train_op():
            loss.backward()
            with torch.no_grad():
                for parameter in model[2].parameters():
                    gradient = reduce_mean(parameter.grad) if reduces else parameter.grad
                    parameter.sub_(0.1 * gradient)
            model.zero_grad()

        return TPUEstimatorSpec(mode, loss=loss, train_op=train_op)

    def reduce_mean(tensor):
        import torch_xla.core.xla_model as xm

        return xm.all_reduce(xm.REDUCE_SUM, tensor.clone(), scale=0.5)

    trainer = make(2, tmp_path, model_fn=by_hand, saves=30)
    if reduces:
        trainer.train(input_fn, max_steps=160)
        return
    with pytest.raises(ReplicaDriftError, match=r"parameter '2\.weight' has not the same .* 0 and 1 at step 60"):
        trainer.train(input_fn, max_steps=160)
    assert trainer.latest_checkpoint().endswith("30")


def test_fault_18_checkpoints_of_replicas_resume_on_another_number_of_them(tmp_path):
    def listed(params, mode):
        return list(itertools.islice(input_fn(params, mode), 30))

    whole = make(4, tmp_path / "whole")
    whole.train(listed, max_steps=30)
    make(4, tmp_path / "parts").train(listed, max_steps=10)
    again = make(2, tmp_path / "parts")
    again.train(listed, max_steps=30)
    for name, tensor in weights(whole)[0].items():
        torch.testing.assert_close(weights(again)[0][name], tensor, atol=1e-5, rtol=1e-5)


def test_replicas_evaluate_with_the_statistics_of_the_checkpoint_and_train_on_with_their_own(tmp_path):
    def batch_norm_net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))

    def statistics(trainer):
        """Returns the running mean on each replica."""
        replica = trainer._sessions[True].replicas[0]
        (array,) = trainer._sessions[True].backend.arrays_of([dict(replica.model.named_buffers())["1.running_mean"]])
        return [torch.tensor(np.asarray(part.data)[0]) for part in array.addressable_shards]

    trainer = make(4, tmp_path, model=batch_norm_net(), saves=10)
    trainer.train(input_fn, max_steps=10)
    own = statistics(trainer)
    assert len(own) == 4 and not torch.equal(own[0], own[1])
    torch.testing.assert_close(weights(trainer)[0]["1.running_mean"], torch.stack(own).mean(0))
    saved = trainer.evaluate(input_fn, checkpoint_path=trainer.latest_checkpoint())
    live = trainer.evaluate(input_fn)
    alone = make(1, tmp_path, model=batch_norm_net()).evaluate(input_fn)
    assert live == saved
    assert alone["accuracy"] == live["accuracy"]
    assert alone["loss"] == pytest.approx(live["loss"], abs=1e-6)
    for before, after in zip(own, statistics(trainer), strict=True):
        assert torch.equal(before, after)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.1, None])
def test_sync_batch_norm_has_the_statistics_of_the_rows_of_all_replicas(momentum, tmp_path):
    def build(params):
        torch.manual_seed(0)
        kind = nn.BatchNorm1d if params["whole"] else nn.SyncBatchNorm
        return nn.Sequential(nn.Linear(6, 16), kind(16, momentum=momentum), nn.Tanh(), nn.Linear(16, 3))

    whole, records, (expected,) = trained(1, tmp_path / "one", model=build, steps=20, params={"whole": True})
    for num_shards in (2, 4):
        trainer, own_records, (got, *_) = trained(
            num_shards, tmp_path / str(num_shards), model=build, steps=20, params={"whole": False})
        for mine, theirs in zip(own_records, records, strict=True):
            np.testing.assert_allclose(np.mean(mine[num_shards:]), theirs[1], atol=1e-5)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)
        assert trainer._sessions[True].backend.step_kind == "replay"
        assert abs(trainer.evaluate(input_fn)["loss"] - whole.evaluate(input_fn)["loss"]) < 1e-5


def test_sync_batch_norm_of_some_processes_is_refused(tmp_path):
    model = nn.Sequential(nn.SyncBatchNorm(6, process_group="some"), nn.Linear(6, 3))
    with pytest.raises(SpecError, match="Leave process_group None"):
        make(2, tmp_path, model=model).train(input_fn, steps=1)


def test_many_starts_of_four_replicas_end_without_a_hang_or_a_thread(tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    threads = threading.active_count()
    for start in range(20):
        trainer = make(4, tmp_path / str(start), loop=50)
        trainer.train(input_fn, steps=200)
        assert trainer._sessions[True].global_step == 200
    assert threading.active_count() <= threads
