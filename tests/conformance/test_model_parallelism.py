"""Rows MP-01 and MP-02: what TPUEstimator checks of model parallelism before any device is asked."""

from __future__ import annotations

import pytest
from torch import nn

from tpuspec import InputPipelineConfig, RunConfig, TPUConfig, TPUEstimatorSpec, Trainer
from tpuspec.tracer.topology import count_replicas

V2 = InputPipelineConfig.PER_HOST_V2


def model_fn(features, labels, mode, params):
    return TPUEstimatorSpec(mode)


def make(tpu_config, *, use_tpu=True):
    return Trainer(model_fn, model=nn.Linear(1, 1), train_batch_size=8, use_tpu=use_tpu, params={},
                   config=RunConfig(model_dir="unused", tpu_config=tpu_config))


@pytest.mark.parametrize("settings", [{"num_cores_per_replica": 2}, {"mesh": {"data": 2, "model": 2}}])
def test_mp_01_a_replica_of_several_cores_needs_per_host_input(settings):
    config = TPUConfig(per_host_input_for_training=False, **settings)
    with pytest.raises(ValueError, match="^Model parallelism only supports per host input for training"):
        make(config)
    make(config, use_tpu=False)


def test_mp_01_a_replica_of_more_cores_than_a_host_has_needs_per_host_v2():
    with pytest.raises(ValueError, match="num_cores_per_replica: 16, num_cores_per_host: 8"):
        count_replicas(TPUConfig(num_cores_per_replica=16), num_devices=32, num_devices_per_host=8)
    spanning = TPUConfig(num_cores_per_replica=16, per_host_input_for_training=V2)
    assert count_replicas(spanning, num_devices=32, num_devices_per_host=8) == 2


def test_mp_01_more_cores_than_there_are_is_a_value_error_and_a_remainder_a_runtime_error():
    with pytest.raises(ValueError, match="at most the number of cores found, 8; got 16"):
        count_replicas(TPUConfig(num_cores_per_replica=16), num_devices=8, num_devices_per_host=8)
    with pytest.raises(RuntimeError, match="The 6 cores found cannot be divided into replicas of 4"):
        count_replicas(TPUConfig(num_cores_per_replica=4), num_devices=6, num_devices_per_host=6)


@pytest.mark.parametrize(("settings", "match"), [
    ({"input_partition_dims": []}, "one or two elements"),
    ({"input_partition_dims": [[1], [1], [1]], "per_host_input_for_training": V2}, "one or two elements"),
    ({"input_partition_dims": [[1, 2]]}, "only supported in PER_HOST_V2 mode"),
    ({"input_partition_dims": [[1, 2]], "num_cores_per_replica": 2}, "only supported in PER_HOST_V2 mode"),
    ({"input_partition_dims": [[1, 2]], "per_host_input_for_training": V2}, "requires setting num_cores_per_replica"),
])
def test_mp_02_input_partition_dims_are_checked_in_this_order(settings, match):
    with pytest.raises(ValueError, match=match):
        TPUConfig(**settings)


def test_mp_02_dims_of_one_or_two_elements_are_kept():
    for dims in ([[1, 2]], [[1, 2], None]):
        config = TPUConfig(input_partition_dims=dims, per_host_input_for_training=V2, num_cores_per_replica=2)
        assert config.input_partition_dims == dims
