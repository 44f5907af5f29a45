"""How many replicas there are: rows BATCH-04, BATCH-15, MP-01 and CFG-07, by arithmetic alone."""

import pytest

from tpuspec.config import TPUConfig
from tpuspec.errors import ConfigError, DeviceError
from tpuspec.tracer.topology import count_replicas


def count(num_devices, per_host=8, **settings):
    return count_replicas(TPUConfig(**settings), num_devices=num_devices, num_devices_per_host=per_host)


@pytest.mark.parametrize(("num_devices", "settings", "expected"), [
    (1, {}, 1), (2, {}, 2), (32, {}, 32),
    (8, {"num_shards": 8}, 8), (8, {"num_shards": 1}, 1), (1, {"num_shards": 1}, 1),
    (8, {"num_cores_per_replica": 1}, 8), (8, {"num_cores_per_replica": 2}, 4), (8, {"num_cores_per_replica": 8}, 1),
    (32, {"num_cores_per_replica": 2}, 16), (32, {"num_cores_per_replica": 2, "num_shards": 16}, 16),
    (8, {"num_cores_per_replica": 8, "num_shards": 1}, 1),
])
def test_devices_and_settings_make_replicas(num_devices, settings, expected):
    assert count(num_devices, **settings) == expected


def test_batch_04_on_per_host_v2_a_replica_may_span_hosts():
    assert count(32, num_cores_per_replica=16, per_host_input_for_training="PER_HOST_V2") == 2


@pytest.mark.parametrize("deployment", [True, "BROADCAST"])
def test_mp_01_elsewhere_a_replica_of_more_cores_than_a_host_has_is_an_error(deployment):
    with pytest.raises(ConfigError, match="num_cores_per_replica: 16, num_cores_per_host: 8"):
        count(32, num_cores_per_replica=16, per_host_input_for_training=deployment)


@pytest.mark.parametrize(("num_devices", "shards", "right"), [(8, 4, 8), (1, 2, 1), (2, 3, 2)])
def test_another_num_shards_than_is_found_is_an_error_that_names_both(num_devices, shards, right):
    with pytest.raises(ConfigError, match=rf"not set correctly, it should be \({right}\), got \({shards}\)"):
        count(num_devices, num_shards=shards)


def test_num_shards_1_with_model_parallelism_counts_replicas_and_not_cores():
    with pytest.raises(ConfigError, match=r"it should be \(4\), got \(1\). 8 devices with 2 cores per replica"):
        count(8, num_shards=1, num_cores_per_replica=2)


@pytest.mark.parametrize("num_devices", [0, -1])
def test_batch_15_without_a_device_there_is_an_error(num_devices):
    with pytest.raises(DeviceError, match="Cannot find any TPU cores") as caught:
        count(num_devices)
    assert isinstance(caught.value, RuntimeError)


def test_batch_15_more_cores_per_replica_than_cores_is_a_value_error():
    with pytest.raises(ConfigError, match="at most the number of cores found, 2; got 4"):
        count(2, num_cores_per_replica=4)


def test_batch_15_cores_that_cannot_be_divided_into_replicas_are_a_runtime_error():
    with pytest.raises(DeviceError, match="The 6 cores found cannot be divided into replicas of 4"):
        count(6, num_cores_per_replica=4)


def test_batch_15_the_division_is_checked_before_num_shards():
    with pytest.raises(DeviceError, match="cannot be divided"):
        count(6, num_cores_per_replica=4, num_shards=3)


def test_batch_15_num_shards_is_checked_before_the_cores_of_a_host():
    with pytest.raises(ConfigError, match="num_shards is not set correctly"):
        count(32, num_cores_per_replica=16, num_shards=3)
