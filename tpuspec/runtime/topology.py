"""How many replicas the found devices make, and whether that is what the settings ask for."""

from __future__ import annotations

from tpuspec.config import InputPipelineConfig, TPUConfig
from tpuspec.errors import ConfigError, DeviceError


def count_replicas(config: TPUConfig, *, num_devices: int, num_devices_per_host: int) -> int:
    """Returns the number of model copies on `num_devices` devices.

    Raises:
      DeviceError: there is no device, or the cores of a replica do not divide them.
      ConfigError: a replica needs more cores than there are, or than a host has, or num_shards differs.

    Source: _TPUContext._validate_tpu_configuration of TPUEstimator.
    """
    if num_devices < 1:
        raise DeviceError("Cannot find any TPU cores. Check PJRT_DEVICE and that no other process holds the devices.")
    cores = config.num_cores_per_replica or 1
    if cores > num_devices:
        raise ConfigError(f"num_cores_per_replica must be at most the number of cores found, {num_devices}; got "
                          f"{cores}.")
    if num_devices % cores:
        raise DeviceError(f"The {num_devices} cores found cannot be divided into replicas of {cores}.")
    if config.num_shards == 1 and config.num_cores_per_replica is None:
        return 1
    num_replicas = num_devices // cores
    if config.num_shards is not None and config.num_shards != num_replicas:
        raise ConfigError(
            f"TPUConfig.num_shards is not set correctly, it should be ({num_replicas}), got ({config.num_shards}). "
            f"{num_devices} devices with {cores} cores per replica were found. Leave it None to take what is found.")
    spans_hosts = cores > num_devices_per_host
    if spans_hosts and config.per_host_input_for_training is not InputPipelineConfig.PER_HOST_V2:
        raise ConfigError(
            "a replica may span hosts in PER_HOST_V2 only; got num_cores_per_replica: "
            f"{cores}, num_cores_per_host: {num_devices_per_host}.")
    return num_replicas
