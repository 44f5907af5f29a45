"""How many replicas, or which mesh, the found devices make, and whether that is what the settings ask for."""

from __future__ import annotations

import math

from tpuspec.config import InputPipelineConfig, TPUConfig
from tpuspec.errors import ConfigError, DeviceError
from tpuspec.mesh import DATA_AXIS, default_mesh, format_mesh


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


def count_replicas_of_host(tpu: TPUConfig, platform: str, num_devices: int, num_hosts: int) -> int:
    """Returns the replicas of each host.

    Raises:
      ConfigError, DeviceError: as `count_replicas`.
    """
    shards = tpu.num_shards
    if platform == "CPU" and shards is not None:
        if shards % num_hosts:
            raise ConfigError(f"num_shards={shards} is counted over all processes, of which there are {num_hosts}; "
                              "make it a multiple of them.")
        if num_devices % (shards // num_hosts):
            raise ConfigError(
                f"TPUConfig.num_shards is not set correctly, it should be ({num_devices * num_hosts}), got ({shards}), "
                "or divide it. The XLA client of this process already runs with that many CPU devices: set "
                f"CPU_NUM_DEVICES={shards // num_hosts} before the first XLA call, or make the Trainer with the most "
                "shards first. Leave it None to take what is found.")
        return shards // num_hosts
    num_replicas = count_replicas(tpu, num_devices=num_devices * num_hosts, num_devices_per_host=num_devices)
    if num_hosts > 1 and num_replicas != num_devices * num_hosts:
        raise ConfigError(f"num_shards=1 takes one device, and this run has {num_hosts} hosts. Leave it None, or start "
                          "one process.")
    return num_replicas // num_hosts


def mesh_axes(config: TPUConfig, *, num_devices: int, takes_all: bool = True) -> dict[str, int]:
    """Returns the axes of the mesh that the devices of all hosts make.

    Args:
      config: names a mesh, or the cores of a replica.
      num_devices: that were found.
      takes_all: whether no device may be left over; virtual ones of a CPU may.

    Raises:
      DeviceError: there is no device, or the cores of a replica do not divide them.
      ConfigError: the mesh needs another number of devices, or the settings do not fit one another.
    """
    axes = config.mesh
    if axes is None and not takes_all and config.num_shards is not None:
        axes = default_mesh(config.num_shards, config.cores_per_replica)
    if axes is None:
        axes = default_mesh(count_replicas(config, num_devices=num_devices, num_devices_per_host=num_devices),
                            config.cores_per_replica)
    needed = math.prod(axes.values())
    if needed > num_devices or (takes_all and needed != num_devices):
        raise ConfigError(f"the mesh ({format_mesh(axes)}) needs {needed} devices, and {num_devices} are there"
                          f"{'; a mesh takes all devices' if takes_all else ''}. On a CPU, set CPU_NUM_DEVICES before "
                          "the first XLA call of the process, or leave it unset: the first Trainer makes as many as "
                          "its mesh needs.")
    if config.fsdp and axes.get(DATA_AXIS, 1) == 1:
        raise ConfigError(f"fsdp splits parameters over the mesh axis {DATA_AXIS!r}, and the mesh "
                          f"({format_mesh(axes)}) has one device there. Set mesh, or num_shards, to have more, or "
                          "leave fsdp out.")
    return dict(axes)


def wanted_devices(config: TPUConfig) -> int | None:
    """Returns how many devices the settings ask for; None where they take what is found."""
    if config.mesh is not None:
        return math.prod(config.mesh.values())
    if config.num_shards is None and config.cores_per_replica == 1:
        return None
    return (config.num_shards or 1) * config.cores_per_replica
