"""What input_fn and model_fn can ask about the deployment: params['context'] and input_context."""

from __future__ import annotations

from dataclasses import dataclass, field

from tpuspec.data.deployment import InputCall
from tpuspec.errors import ConfigError, SpecUsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceAssignment:
    """Which cores are whose: those of replica 0 come first, and each host has equally many.

    Attributes:
      num_hosts: hosts with devices.
      num_replicas: model copies over all hosts.
      num_cores_per_replica: devices that share one model copy.

    Source: tf.tpu.experimental.DeviceAssignment.
    """

    num_hosts: int
    num_replicas: int
    num_cores_per_replica: int

    @property
    def num_cores_per_host(self) -> int:
        """Devices of each host."""
        return self.num_replicas * self.num_cores_per_replica // self.num_hosts

    def host_device(self, replica: int = 0, logical_core: int = 0) -> str:
        """Returns the host of a replica's core, 'host:1/cpu'.

        Raises:
          ConfigError: there is no such replica, or no such core in it.
        """
        return f"host:{self._place(replica, logical_core)[0]}/cpu"

    def tpu_ordinal(self, replica: int = 0, logical_core: int = 0) -> int:
        """Returns the number of a replica's core on its host.

        Raises:
          ConfigError: as host_device.
        """
        return self._place(replica, logical_core)[1]

    def lookup_replicas(self, host: int, logical_core: int = 0) -> list[int]:
        """Returns the replicas whose core of that number is on a host, in order."""
        return [replica for replica in range(self.num_replicas) if self._place(replica, logical_core)[0] == host]

    def _place(self, replica: int, logical_core: int) -> tuple[int, int]:
        for name, value, count in (("replica", replica, self.num_replicas),
                                   ("logical_core", logical_core, self.num_cores_per_replica)):
            if not 0 <= value < count:
                raise ConfigError(f"{name} must be in 0 .. {count - 1}; got {value}.")
        return divmod(replica * self.num_cores_per_replica + logical_core, self.num_cores_per_host)


@dataclass(frozen=True, slots=True, kw_only=True)
class TPUContext:
    """The deployment as seen from one call of input_fn, or from model_fn.

    Attributes:
      num_hosts: hosts with devices.
      num_replicas: model copies over all hosts.
      call: the call of input_fn this context was made for; None in model_fn.
      num_cores_per_replica: TPUConfig's: devices that share one model copy; None without model parallelism.

    Source: tf.tpu.TPUContext.
    """

    num_hosts: int
    num_replicas: int
    call: InputCall | None = None
    num_cores_per_replica: int | None = None
    _asked: list[str] = field(default_factory=list, repr=False, compare=False)

    @property
    def was_asked(self) -> bool:
        """Whether anyone asked which call of input_fn this is, and so may deal out rows by it."""
        return bool(self._asked)

    @property
    def current_host(self) -> int:
        """Host of this call of input_fn.

        Raises:
          SpecUsageError: in model_fn, which is traced once for all hosts.
        """
        return self._input_call("current_host").host

    @property
    def num_of_replicas_per_host(self) -> int:
        """Model copies on each host.

        Raises:
          ConfigError: with model parallelism, where a copy may span hosts.
        """
        if self.num_cores_per_replica is not None:
            raise ConfigError("num_of_replicas_per_host is not supported for model parallelism, where a replica may "
                              f"span hosts; got num_cores_per_replica={self.num_cores_per_replica}. Ask "
                              "device_assignment in model_fn.")
        return self.num_replicas // self.num_hosts

    @property
    def device_assignment(self) -> DeviceAssignment | None:
        """Which cores are whose; None without num_cores_per_replica.

        Raises:
          SpecUsageError: in input_fn.
        """
        if self.call is not None:
            raise SpecUsageError("device_assignment must not be called from input_fn; it belongs to model_fn.")
        return None if self.num_cores_per_replica is None else self._assignment

    def current_input_fn_deployment(self) -> tuple[str, int, int, int]:
        """Returns (host device, number of this call, number of all calls, replicas it feeds).

        Raises:
          SpecUsageError: in model_fn.
        """
        call = self._input_call("current_input_fn_deployment")
        return f"host:{call.host}/cpu", call.index, call.num_calls, call.num_replicas

    def device_for_replica(self, replica: int) -> tuple[str, int]:
        """Returns (host device, ordinal on that host) of a replica's first core.

        Raises:
          ConfigError: there is no such replica.
        """
        return self._assignment.host_device(replica), self._assignment.tpu_ordinal(replica)

    @property
    def _assignment(self) -> DeviceAssignment:
        return DeviceAssignment(num_hosts=self.num_hosts, num_replicas=self.num_replicas,
                                num_cores_per_replica=self.num_cores_per_replica or 1)

    def _input_call(self, name: str) -> InputCall:
        if self.call is None:
            raise SpecUsageError(f"{name} must not be called from model_fn; it belongs to input_fn.")
        self._asked.append(name)
        return self.call


@dataclass(frozen=True, slots=True, kw_only=True)
class InputContext:
    """The `input_context` argument of input_fn.

    Attributes:
      num_input_pipelines: calls of input_fn over all hosts.
      input_pipeline_id: number of this call.
      num_replicas_in_sync: model copies over all hosts.

    Source: tf.distribute.InputContext.
    """

    num_input_pipelines: int
    input_pipeline_id: int
    num_replicas_in_sync: int

    def get_per_replica_batch_size(self, global_batch_size: int) -> int:
        """Returns the rows of one replica.

        Raises:
          ConfigError: the replicas do not divide the batch size.
        """
        if global_batch_size % self.num_replicas_in_sync:
            raise ConfigError(f"global batch size {global_batch_size} must be divisible by number of replicas "
                              f"{self.num_replicas_in_sync}.")
        return global_batch_size // self.num_replicas_in_sync
