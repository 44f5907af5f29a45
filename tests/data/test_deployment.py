"""Who calls input_fn with which batch size: rows BATCH-01 .. BATCH-09 and the cheat sheet, by arithmetic alone."""

import pytest

from tpuspec.config import InputPipelineConfig, TPUConfig
from tpuspec.data.deployment import InputCall, InputPlan, deployment_of, plan_input, plan_native_input
from tpuspec.errors import ConfigError
from tpuspec.spec.mode import ModeKeys

TRAIN, EVAL, PREDICT = ModeKeys.TRAIN, ModeKeys.EVAL, ModeKeys.PREDICT
PER_SHARD_V1, PER_HOST_V1 = InputPipelineConfig.PER_SHARD_V1, InputPipelineConfig.PER_HOST_V1
PER_HOST_V2, BROADCAST = InputPipelineConfig.PER_HOST_V2, InputPipelineConfig.BROADCAST
SLICED = InputPipelineConfig.SLICED


def config_of(deployment: InputPipelineConfig) -> TPUConfig:
    if deployment is SLICED:
        return TPUConfig(eval_training_input_configuration=SLICED)
    return TPUConfig(per_host_input_for_training=deployment)


def plan(deployment: InputPipelineConfig, batch_size: int, *, hosts: int = 1, replicas: int = 2,
         mode: ModeKeys = TRAIN) -> InputPlan:
    return plan_input(mode, config_of(deployment), global_batch_size=batch_size, num_hosts=hosts,
                      num_replicas=replicas)


def deployments(plan: InputPlan) -> list[tuple[int, int, int, int]]:
    """Returns (host, index, calls, replicas fed) of each call."""
    return [(call.host, call.index, call.num_calls, call.num_replicas) for call in plan.calls]


@pytest.mark.parametrize(("replicas", "size"), [(2, 64), (8, 16)])
def test_batch_01_per_core_input_calls_once_per_core_with_its_share(replicas, size):
    made = plan(PER_SHARD_V1, 128, replicas=replicas)
    assert [call.batch_size for call in made.calls] == [size] * replicas
    assert made.replica_batch_size == size


def test_batch_01_512_on_32_cores_of_4_hosts_are_32_calls_of_16_in_order():
    made = plan(PER_SHARD_V1, 512, hosts=4, replicas=32)
    assert deployments(made) == [(i // 8, i, 32, 1) for i in range(32)]
    assert {call.batch_size for call in made.calls} == {16}
    assert [call.first_replica for call in made.calls] == list(range(32))


@pytest.mark.parametrize(("batch", "hosts", "replicas", "size"), [
    (128, 1, 2, 128), (128, 1, 8, 128), (512, 4, 32, 128), (1024, 4, 32, 256)])
def test_batch_02_per_host_input_calls_once_per_host_with_the_hosts_share(batch, hosts, replicas, size):
    made = plan(PER_HOST_V1, batch, hosts=hosts, replicas=replicas)
    assert deployments(made) == [(h, h, hosts, replicas // hosts) for h in range(hosts)]
    assert {call.batch_size for call in made.calls} == {size}
    assert made.replica_batch_size == batch // replicas
    assert all(call.splits and call.batches_per_step == 1 for call in made.calls)


@pytest.mark.parametrize(("batch", "hosts", "replicas", "size"), [
    (512, 4, 32, 16), (128, 1, 2, 64), (128, 1, 1, 128), (512, 4, 16, 32)])
def test_batch_03_per_host_v2_calls_once_per_host_and_draws_one_batch_a_replica(batch, hosts, replicas, size):
    made = plan(PER_HOST_V2, batch, hosts=hosts, replicas=replicas)
    assert deployments(made) == [(h, h, hosts, replicas // hosts) for h in range(hosts)]
    assert {call.batch_size for call in made.calls} == {size} == {made.replica_batch_size}
    assert {call.batches_per_step for call in made.calls} == {replicas // hosts}
    assert not any(call.splits for call in made.calls)


@pytest.mark.parametrize("batch", [512, 127, 7, 1])
@pytest.mark.parametrize("mode", [TRAIN, EVAL, PREDICT])
def test_batch_05_broadcast_calls_once_in_all_with_the_global_size_divisible_or_not(mode, batch):
    made = plan(BROADCAST, batch, hosts=4, replicas=32, mode=mode)
    assert deployments(made) == [(0, 0, 1, 32)]
    assert made.calls[0].batch_size == made.replica_batch_size == batch
    assert made.broadcast
    assert not made.calls[0].splits


@pytest.mark.parametrize("mode", [EVAL, PREDICT])
def test_batch_06_sliced_calls_once_on_host_0_with_the_global_size_and_splits(mode):
    made = plan(SLICED, 16, mode=mode)
    assert deployments(made) == [(0, 0, 1, 2)]
    assert (made.calls[0].batch_size, made.replica_batch_size, made.calls[0].splits) == (16, 8, True)
    assert not made.broadcast
    assert deployments(plan(SLICED, 512, hosts=4, replicas=32, mode=mode)) == [(0, 0, 1, 32)]


def test_batch_06_sliced_leaves_training_to_its_own_deployment():
    for deployment in (PER_SHARD_V1, PER_HOST_V1, PER_HOST_V2, BROADCAST):
        config = TPUConfig(per_host_input_for_training=deployment, eval_training_input_configuration=SLICED)
        assert deployment_of(TRAIN, config) is deployment
        assert deployment_of(EVAL, config) is deployment_of(PREDICT, config) is SLICED


@pytest.mark.parametrize(("mode", "name"), [(TRAIN, "train"), (EVAL, "eval"), (PREDICT, "predict")])
@pytest.mark.parametrize("deployment", [PER_SHARD_V1, PER_HOST_V1, PER_HOST_V2])
def test_batch_08_a_size_that_the_replicas_do_not_divide_is_an_error_that_names_a_near_one(deployment, mode, name):
    with pytest.raises(ConfigError, match=f"{name} batch size 127 must be divisible by number of replicas 8. Try 128"):
        plan(deployment, 127, replicas=8, mode=mode)


@pytest.mark.parametrize(("batch", "nearest"), [(1, 8), (3, 8), (9, 8), (13, 16), (100, 96)])
def test_the_proposed_batch_size_is_the_nearest_that_can_be_divided(batch, nearest):
    with pytest.raises(ConfigError, match=rf"Try {nearest}\."):
        plan(PER_HOST_V1, batch, replicas=8)


@pytest.mark.parametrize("mode", [EVAL, PREDICT])
def test_batch_09_per_core_input_is_for_training_only(mode):
    assert deployment_of(mode, config_of(PER_SHARD_V1)) is PER_HOST_V1
    assert plan(PER_SHARD_V1, 16, mode=mode).calls == plan(PER_HOST_V1, 16, mode=mode).calls


@pytest.mark.parametrize("batch", [None, 1, 127])
def test_batch_11_without_xla_there_is_one_call_with_the_size_as_it_is(batch):
    made = plan_native_input(batch)
    assert made.calls == (InputCall(index=0, num_calls=1, host=0, first_replica=0, num_replicas=1, batch_size=batch),)
    assert made.replica_batch_size == batch
    assert not made.broadcast


@pytest.mark.parametrize(("mode", "name", "verb"), [
    (TRAIN, "train", "train"), (EVAL, "eval", "evaluate"), (PREDICT, "predict", "predict")])
def test_a_missing_batch_size_is_an_error_that_names_its_argument(mode, name, verb):
    with pytest.raises(ConfigError, match=f"{name}_batch_size in TPUEstimator constructor cannot be `None` to {verb}"):
        plan_input(mode, TPUConfig(), global_batch_size=None, num_hosts=1, num_replicas=2)


G, H, R = 512, 4, 32


@pytest.mark.parametrize(("deployment", "modes", "calls", "input_size", "model_size"), [
    (PER_SHARD_V1, [TRAIN], R, G // R, G // R),
    (PER_SHARD_V1, [EVAL, PREDICT], H, G // H, G // R),
    (PER_HOST_V1, [TRAIN, EVAL, PREDICT], H, G // H, G // R),
    (PER_HOST_V2, [TRAIN, EVAL, PREDICT], H, G // R, G // R),
    (BROADCAST, [TRAIN, EVAL, PREDICT], 1, G, G),
    (SLICED, [EVAL, PREDICT], 1, G, G // R),
])
def test_the_cheat_sheet_holds(deployment, modes, calls, input_size, model_size):
    for mode in modes:
        made = plan(deployment, G, hosts=H, replicas=R, mode=mode)
        assert len(made.calls) == calls
        assert {call.batch_size for call in made.calls} == {input_size}
        assert made.replica_batch_size == model_size


@pytest.mark.parametrize("deployment", [PER_SHARD_V1, PER_HOST_V1, PER_HOST_V2, BROADCAST])
def test_the_calls_feed_every_replica_once_in_order(deployment):
    made = plan(deployment, G, hosts=H, replicas=R)
    fed = [call.first_replica + i for call in made.calls for i in range(call.num_replicas)]
    assert fed == list(range(R))


@pytest.mark.parametrize(("deployment", "indices"), [
    (PER_SHARD_V1, [[*range(0, 8)], [*range(8, 16)], [*range(16, 24)], [*range(24, 32)]]),
    (PER_HOST_V1, [[0], [1], [2], [3]]), (PER_HOST_V2, [[0], [1], [2], [3]]), (BROADCAST, [[0], [], [], []])])
def test_each_host_makes_its_own_calls(deployment, indices):
    made = plan(deployment, G, hosts=H, replicas=R)
    assert [[call.index for call in made.on_host(host)] for host in range(H)] == indices
