"""Rows BATCH-01 .. BATCH-15 of the conformance list: batch sizes, and which call of input_fn feeds whom."""

from __future__ import annotations

import pytest
import torch

from tests.models import input_fn, make_config, make_model, make_spec, make_trainer, run
from tests.several_replicas import use_fake
from tpuspec import InputPipelineConfig, ModeKeys, TPUConfig
from tpuspec.data.context import TPUContext
from tpuspec.data.deployment import plan_input
from tpuspec.tracer.topology import count_replicas

V1, V2, PER_CORE = InputPipelineConfig.PER_HOST_V1, InputPipelineConfig.PER_HOST_V2, InputPipelineConfig.PER_SHARD_V1
BROADCAST, SLICED = InputPipelineConfig.BROADCAST, InputPipelineConfig.SLICED


def plan(deployment, batch_size, *, hosts=4, replicas=32, mode=ModeKeys.TRAIN, evaluation=None):
    config = TPUConfig(per_host_input_for_training=deployment,
                       **({} if evaluation is None else {"eval_training_input_configuration": evaluation}))
    return plan_input(mode, config, global_batch_size=batch_size, num_hosts=hosts, num_replicas=replicas)


def deployments(plan, hosts=4, replicas=32):
    contexts = [TPUContext(num_hosts=hosts, num_replicas=replicas, call=call) for call in plan.calls]
    return [(context.current_host, *context.current_input_fn_deployment()[1:]) for context in contexts]


@pytest.mark.parametrize(("replicas", "size"), [(2, 64), (8, 16)])
def test_batch_01_per_core_input_is_called_once_a_core_with_its_share(replicas, size):
    calls = plan(PER_CORE, 128, hosts=1, replicas=replicas).calls
    assert [call.batch_size for call in calls] == [size] * replicas


def test_batch_01_per_core_input_on_four_hosts():
    made = plan(PER_CORE, 512)
    assert [call.batch_size for call in made.calls] == [16] * 32
    assert deployments(made) == [(i // 8, i, 32, 1) for i in range(32)]


@pytest.mark.parametrize(("batch_size", "hosts", "sizes"), [
    (128, 1, [128]), (512, 4, [128] * 4), (1024, 4, [256] * 4)])
def test_batch_02_per_host_input_is_called_once_a_host_with_its_share(batch_size, hosts, sizes):
    made = plan(V1, batch_size, hosts=hosts, replicas=8 * hosts)
    assert [call.batch_size for call in made.calls] == sizes
    assert deployments(made, hosts, 8 * hosts) == [(i, i, hosts, 8) for i in range(hosts)]


@pytest.mark.parametrize(("batch_size", "hosts", "replicas", "sizes", "fed"), [
    (512, 4, 32, [16] * 4, 8), (128, 1, 2, [64], 2), (128, 1, 1, [128], 1), (512, 4, 16, [32] * 4, 4)])
def test_batch_03_per_host_v2_is_called_once_a_host_with_a_replicas_batch(batch_size, hosts, replicas, sizes, fed):
    made = plan(V2, batch_size, hosts=hosts, replicas=replicas)
    assert [call.batch_size for call in made.calls] == sizes
    assert {call.num_replicas for call in made.calls} == {fed} == {call.batches_per_step for call in made.calls}


def watched(seen):
    def watched_model_fn(features, labels, mode, params, model, optimizer):
        seen.append((mode, params["batch_size"], tuple(features.shape)))
        return make_spec(mode, model(features), labels, optimizer)

    return watched_model_fn


def counted(calls):
    def counted_input_fn(params):
        calls.append(params["batch_size"])
        rows = torch.arange(12.0).reshape(12, 1)
        return torch.utils.data.TensorDataset(rows, rows)

    return counted_input_fn


def fake_trainer(tmp_path, seen, *, batch_size=4, **tpu):
    return make_trainer(tmp_path, watched(seen), eval_batch_size=batch_size, predict_batch_size=batch_size,
                        train_batch_size=batch_size, config=make_config(tpu_config=TPUConfig(**tpu)))


def test_batch_03_each_step_draws_a_batch_a_replica_in_replica_order(tmp_path, monkeypatch):
    fakes = use_fake(monkeypatch, 2)
    rows = list(fake_trainer(tmp_path, [], per_host_input_for_training=V2).predict(counted(calls := [])))
    assert calls == [2]
    fed = [batch.features.flatten().tolist() for batch in fakes[0].fed[-1]]
    assert fed == [[8, 9], [10, 11]]
    assert len(rows) == 12


def test_batch_04_a_replica_that_spans_hosts_is_fed_by_the_host_of_its_first_core():
    assert count_replicas(TPUConfig(num_cores_per_replica=16, per_host_input_for_training=V2), num_devices=32,
                          num_devices_per_host=8) == 2
    made = plan(V2, 512, hosts=4, replicas=2)
    assert deployments(made, 4, 2) == [(0, 0, 2, 1), (2, 1, 2, 1)]
    assert [(call.batch_size, call.batches_per_step, call.first_replica) for call in made.calls] == [
        (256, 1, 0), (256, 1, 1)]
    assert [len(made.on_host(host)) for host in range(4)] == [1, 0, 1, 0]
    assert made.replica_batch_size == 256


@pytest.mark.parametrize("mode", list(ModeKeys))
def test_batch_05_broadcast_is_called_once_in_total_and_needs_no_divisible_batch(mode):
    made = plan(BROADCAST, 127, mode=mode)
    assert (made.replica_batch_size, [call.batch_size for call in made.calls]) == (127, [127])
    assert deployments(made) == [(0, 0, 1, 32)]


def test_batch_05_all_replicas_get_the_broadcast_rows_and_the_first_ones_count(tmp_path, monkeypatch):
    fakes = use_fake(monkeypatch, 2)
    trainer = fake_trainer(tmp_path, seen := [], batch_size=7, per_host_input_for_training=BROADCAST)
    assert len(list(trainer.predict(counted(calls := [])))) == 12
    assert calls == [7] and {size for _, size, _ in seen} == {7}
    assert all(torch.equal(*(batch.features for batch in fed)) for fed in fakes[0].fed)


@pytest.mark.parametrize("mode", [ModeKeys.EVAL, ModeKeys.PREDICT])
def test_batch_06_sliced_calls_input_fn_once_on_host_0_and_slices_the_batch(mode):
    made = plan(V1, 16, hosts=1, replicas=2, mode=mode, evaluation=SLICED)
    assert [(call.host, call.batch_size, call.splits) for call in made.calls] == [(0, 16, True)]
    assert deployments(made, 1, 2) == [(0, 0, 1, 2)]
    assert made.replica_batch_size == 8


def test_batch_06_sliced_leaves_training_as_it_is_and_gives_replica_i_the_ith_slice(tmp_path, monkeypatch):
    assert [call.batch_size for call in plan(V2, 16, hosts=1, replicas=2, evaluation=SLICED).calls] == [8]
    fakes = use_fake(monkeypatch, 2)
    list(fake_trainer(tmp_path, [], eval_training_input_configuration=SLICED).predict(counted(calls := [])))
    assert calls == [4]
    assert [batch.features.flatten().tolist() for batch in fakes[0].fed[-1]] == [[8, 9], [10, 11]]


@pytest.mark.parametrize("arguments", [{"use_tpu": False}, {"eval_on_tpu": False}])
def test_batch_07_sliced_on_the_cpu_is_a_value_error(tmp_path, arguments):
    config = make_config(tpu_config=TPUConfig(eval_training_input_configuration=SLICED))
    with pytest.raises(ValueError, match="Invalid TPUConfig `eval_training_input_configuration` value. SLICED mode "
                                         "only works on use_tpu = True."):
        make_trainer(tmp_path, config=config, **arguments).evaluate(input_fn)


@pytest.mark.parametrize(("verb", "name"), [("train", "train"), ("evaluate", "eval"), ("predict", "predict")])
def test_batch_08_a_batch_that_replicas_do_not_divide_is_a_value_error_before_input_fn_is_looked_at(
        tmp_path, monkeypatch, verb, name):
    use_fake(monkeypatch, 2)
    trainer = fake_trainer(tmp_path, [], batch_size=127)
    with pytest.raises(ValueError, match=f"{name} batch size 127 must be divisible by number of replicas 2. Try 128"):
        run(trainer, verb, lambda: pytest.fail("was called"))


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_batch_09_per_core_input_is_for_training_only(tmp_path, monkeypatch, verb):
    use_fake(monkeypatch, 2)
    trainer = fake_trainer(tmp_path, seen := [], per_host_input_for_training=PER_CORE)
    run(trainer, verb, counted(calls := []))
    assert calls == [4]
    assert {(size, shape) for _, size, shape in seen} == {(2, (2, 1))}


@pytest.mark.parametrize(("verb", "replicas"), [("train", 1), ("evaluate", 2), ("predict", 2)])
def test_batch_10_input_fn_sees_the_global_batch_and_model_fn_a_replicas_in_every_mode(
        tmp_path, monkeypatch, verb, replicas):
    use_fake(monkeypatch, replicas)
    run(fake_trainer(tmp_path, seen := []), verb, counted(calls := []))
    assert calls == [4]
    share = 4 // replicas
    assert {(size, shape) for _, size, shape in seen} == {(share, (share, 1))}


@pytest.mark.parametrize("verb", ["train", "evaluate", "predict"])
def test_batch_11_without_xla_the_batch_size_is_the_global_one_for_both(tmp_path, verb):
    trainer = make_trainer(tmp_path, watched(seen := []), use_tpu=False, train_batch_size=3, eval_batch_size=3,
                           predict_batch_size=3)
    run(trainer, verb, counted(calls := []))
    assert calls == [3] and {size for _, size, _ in seen} == {3}


@pytest.mark.parametrize("verb", ["train", "evaluate", "predict"])
def test_batch_11_without_xla_and_without_a_batch_size_the_key_is_absent(tmp_path, verb):
    seen = []

    def no_size(params):
        seen.append(dict(params))
        return [(torch.ones(2, 1), torch.zeros(2, 1))] * 2

    run(make_trainer(tmp_path, use_tpu=False, train_batch_size=None, eval_batch_size=None,
                     predict_batch_size=None), verb, no_size)
    assert seen == [{}]


@pytest.mark.parametrize("params", [{}, None])
def test_batch_12_the_context_tells_replicas_and_hosts(tmp_path, monkeypatch, params):
    use_fake(monkeypatch, 2)
    seen = []

    def asks(params):
        context = params["context"]
        seen.append((context.num_replicas, context.num_hosts, context.current_host, context.num_of_replicas_per_host,
                     [context.device_for_replica(replica)[1] for replica in range(2)],
                     {context.device_for_replica(replica)[0] for replica in range(2)}))
        return input_fn(params)

    run(make_trainer(tmp_path, params=params, model=make_model), "evaluate", asks)
    assert seen == [(2, 1, 0, 2, [0, 1], {"host:0/cpu"})]


def asking(seen, question):
    """A model_fn that asks its context something."""
    def asking_model_fn(features, labels, mode, params, model, optimizer):
        seen.append(question(params["context"]))
        return make_spec(mode, model(features), labels, optimizer)

    return asking_model_fn


@pytest.mark.parametrize("verb", ["train", "evaluate", "predict"])
@pytest.mark.parametrize(("name", "question"), [
    ("current_input_fn_deployment", lambda context: context.current_input_fn_deployment()),
    ("current_host", lambda context: context.current_host)])
def test_batch_13_what_belongs_to_input_fn_is_a_runtime_error_in_model_fn(tmp_path, verb, name, question):
    with pytest.raises(RuntimeError, match=f"{name} must not be called from model_fn"):
        run(make_trainer(tmp_path, asking([], question)), verb)


def test_batch_13_device_assignment_is_a_runtime_error_in_input_fn(tmp_path):
    with pytest.raises(RuntimeError, match="device_assignment must not be called from input_fn"):
        make_trainer(tmp_path).evaluate(lambda params: params["context"].device_assignment)


@pytest.mark.parametrize("cores", [None, 1])
def test_batch_13_model_fn_has_a_device_assignment_where_num_cores_per_replica_is_set(tmp_path, cores):
    trainer = make_trainer(tmp_path, asking(seen := [], lambda context: context.device_assignment),
                           config=make_config(tpu_config=TPUConfig(num_cores_per_replica=cores)))
    trainer.train(input_fn, steps=1)
    if cores is None:
        assert set(seen) == {None}
    else:
        assert {(found.num_replicas, found.num_cores_per_replica, found.tpu_ordinal()) for found in seen} == {(1, 1, 0)}


def test_batch_13_the_replicas_of_a_host_are_not_told_with_model_parallelism():
    with pytest.raises(ValueError, match="num_of_replicas_per_host is not supported for model parallelism"):
        _ = TPUContext(num_hosts=4, num_replicas=2, num_cores_per_replica=16).num_of_replicas_per_host


@pytest.mark.parametrize("deployment", [V1, V2, BROADCAST])
@pytest.mark.parametrize("mode", [ModeKeys.EVAL, ModeKeys.PREDICT])
@pytest.mark.parametrize(("hosts", "replicas"), [(2, 2), (2, 16), (1, 1)])
def test_batch_14_evaluate_and_predict_are_planned_on_several_hosts_with_every_deployment(
        deployment, mode, hosts, replicas):
    made = plan(deployment, 32, hosts=hosts, replicas=replicas, mode=mode)
    fed = [call.first_replica + i for call in made.calls for i in range(call.num_replicas)]
    assert fed == list(range(replicas))


@pytest.mark.parametrize(("devices", "settings", "kind", "message"), [
    (0, {"num_cores_per_replica": 2, "num_shards": 3}, RuntimeError, "Cannot find any TPU cores"),
    (8, {"num_cores_per_replica": 16, "num_shards": 3}, ValueError, "at most the number of cores found, 8; got 16"),
    (6, {"num_cores_per_replica": 4, "num_shards": 3}, RuntimeError, "cannot be divided into replicas of 4"),
    (32, {"num_cores_per_replica": 16, "num_shards": 3}, ValueError, r"it should be \(2\), got \(3\)"),
    (32, {"num_cores_per_replica": 16}, ValueError, "num_cores_per_replica: 16, num_cores_per_host: 8"),
    (32, {"num_cores_per_replica": 16, "per_host_input_for_training": V2}, None, "")])
def test_batch_15_devices_are_checked_in_this_order(devices, settings, kind, message):
    if kind is None:
        assert count_replicas(TPUConfig(**settings), num_devices=devices, num_devices_per_host=8) == 2
        return
    with pytest.raises(kind, match=message):
        count_replicas(TPUConfig(**settings), num_devices=devices, num_devices_per_host=8)


@pytest.mark.parametrize(("verb", "name"), [("evaluate", "eval_batch_size"), ("predict", "predict_batch_size")])
def test_batch_15_devices_come_before_the_batch_size_and_that_before_input_fn(tmp_path, verb, name):
    def never(params):
        pytest.fail("was called")

    trainer = make_trainer(tmp_path / "a", **{name: None}, config=make_config(tpu_config=TPUConfig(num_shards=16)))
    with pytest.raises((ValueError, RuntimeError), match="num_shards is not set correctly|CPU_NUM_DEVICES"):
        run(trainer, verb, never)
    with pytest.raises(ValueError, match=f"{name} in TPUEstimator constructor cannot be `None`"):
        run(make_trainer(tmp_path / "b", **{name: None}), verb, never)


def test_batch_15_a_missing_batch_size_comes_before_one_that_does_not_divide():
    with pytest.raises(ValueError, match="cannot be `None`"):
        plan(V1, None)
    with pytest.raises(ValueError, match="must be divisible"):
        plan(V1, 33)
