"""params['context'] and input_context: rows BATCH-12 and BATCH-13."""

import pytest

from tpuspec.config import TPUConfig
from tpuspec.data.context import DeviceAssignment, InputContext, TPUContext
from tpuspec.data.deployment import plan_input
from tpuspec.errors import ConfigError, SpecUsageError
from tpuspec.spec.mode import ModeKeys


def contexts(deployment: object, *, hosts: int, replicas: int) -> list[TPUContext]:
    plan = plan_input(ModeKeys.TRAIN, TPUConfig(per_host_input_for_training=deployment), global_batch_size=512,
                      num_hosts=hosts, num_replicas=replicas)
    return [TPUContext(num_hosts=hosts, num_replicas=replicas, call=call) for call in plan.calls]


def test_batch_12_input_fn_on_one_host_sees_all_replicas():
    (context,) = contexts(True, hosts=1, replicas=8)
    assert (context.num_replicas, context.num_hosts, context.current_host) == (8, 1, 0)
    assert context.num_of_replicas_per_host == 8
    assert [context.device_for_replica(r) for r in range(8)] == [("host:0/cpu", r) for r in range(8)]


def test_device_for_replica_counts_ordinals_on_each_host():
    context = TPUContext(num_hosts=4, num_replicas=32)
    assert [context.device_for_replica(r) for r in (0, 7, 8, 31)] == [
        ("host:0/cpu", 0), ("host:0/cpu", 7), ("host:1/cpu", 0), ("host:3/cpu", 7)]


@pytest.mark.parametrize("replica", [-1, 8])
def test_a_replica_that_does_not_exist_has_no_device(replica):
    with pytest.raises(ConfigError, match=rf"replica must be in 0 \.\. 7; got {replica}"):
        TPUContext(num_hosts=1, num_replicas=8).device_for_replica(replica)


@pytest.mark.parametrize(("deployment", "expected"), [
    (False, [(f"host:{i // 8}/cpu", i, 32, 1) for i in range(32)]),
    (True, [(f"host:{h}/cpu", h, 4, 8) for h in range(4)]),
    ("PER_HOST_V2", [(f"host:{h}/cpu", h, 4, 8) for h in range(4)]),
    ("BROADCAST", [("host:0/cpu", 0, 1, 32)]),
])
def test_each_call_of_input_fn_sees_its_deployment(deployment, expected):
    made = contexts(deployment, hosts=4, replicas=32)
    assert [context.current_input_fn_deployment() for context in made] == expected
    assert [f"host:{context.current_host}/cpu" for context in made] == [device for device, *_ in expected]


def test_batch_13_what_belongs_to_input_fn_must_not_be_asked_in_model_fn():
    context = TPUContext(num_hosts=1, num_replicas=2)
    with pytest.raises(SpecUsageError, match="current_input_fn_deployment must not be called from model_fn") as caught:
        context.current_input_fn_deployment()
    assert isinstance(caught.value, RuntimeError)
    with pytest.raises(RuntimeError, match="current_host must not be called from model_fn"):
        _ = context.current_host


def test_input_context_gives_the_rows_of_one_replica():
    context = InputContext(num_input_pipelines=4, input_pipeline_id=0, num_replicas_in_sync=32)
    assert context.get_per_replica_batch_size(512) == 16
    with pytest.raises(ConfigError, match="global batch size 127 must be divisible by number of replicas 32"):
        context.get_per_replica_batch_size(127)


def test_batch_12_cores_of_a_replica_follow_one_another_over_hosts():
    assignment = DeviceAssignment(num_hosts=4, num_replicas=2, num_cores_per_replica=16)
    assert assignment.num_cores_per_host == 8
    assert [assignment.host_device(1, core) for core in (0, 7, 8)] == ["host:2/cpu", "host:2/cpu", "host:3/cpu"]
    assert [assignment.tpu_ordinal(0, core) for core in (0, 7, 8, 15)] == [0, 7, 0, 7]
    assert [assignment.lookup_replicas(host) for host in range(4)] == [[0], [], [1], []]
    assert TPUContext(num_hosts=4, num_replicas=2, num_cores_per_replica=16).device_for_replica(1) == ("host:2/cpu", 0)


@pytest.mark.parametrize(("replica", "core", "message"), [
    (2, 0, r"replica must be in 0 \.\. 1; got 2"), (0, 4, r"logical_core must be in 0 \.\. 3; got 4")])
def test_a_core_that_does_not_exist_has_no_place(replica, core, message):
    with pytest.raises(ConfigError, match=message):
        DeviceAssignment(num_hosts=1, num_replicas=2, num_cores_per_replica=4).host_device(replica, core)
