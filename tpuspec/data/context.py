"""What input_fn and model_fn can ask about the deployment: params['context'] and input_context."""

from __future__ import annotations

from dataclasses import dataclass, field

from tpuspec.data.deployment import InputCall
from tpuspec.errors import ConfigError, SpecUsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class TPUContext:
    """The deployment as seen from one call of input_fn, or from model_fn.

    Attributes:
      num_hosts: hosts with devices.
      num_replicas: model copies over all hosts.
      call: the call of input_fn this context was made for; None in model_fn.

    Source: tf.tpu.TPUContext.
    """

    num_hosts: int
    num_replicas: int
    call: InputCall | None = None
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
        """Model copies on each host."""
        return self.num_replicas // self.num_hosts

    def current_input_fn_deployment(self) -> tuple[str, int, int, int]:
        """Returns (host device, number of this call, number of all calls, replicas it feeds).

        Raises:
          SpecUsageError: in model_fn.
        """
        call = self._input_call("current_input_fn_deployment")
        return f"host:{call.host}/cpu", call.index, call.num_calls, call.num_replicas

    def device_for_replica(self, replica: int) -> tuple[str, int]:
        """Returns (host device, ordinal on that host) of a replica.

        Raises:
          ConfigError: there is no such replica.
        """
        if not 0 <= replica < self.num_replicas:
            raise ConfigError(f"replica must be in 0 .. {self.num_replicas - 1}; got {replica}.")
        host, ordinal = divmod(replica, self.num_of_replicas_per_host)
        return f"host:{host}/cpu", ordinal

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
