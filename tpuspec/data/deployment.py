"""Which host calls input_fn how often, with which batch size, and who gets the rows: arithmetic without devices."""

from __future__ import annotations

from dataclasses import dataclass

from tpuspec.config import InputPipelineConfig, TPUConfig
from tpuspec.errors import ConfigError
from tpuspec.spec.mode import ModeKeys

_NAMES = {ModeKeys.TRAIN: "train", ModeKeys.EVAL: "eval", ModeKeys.PREDICT: "predict"}


@dataclass(frozen=True, slots=True, kw_only=True)
class InputCall:
    """One call of input_fn.

    Attributes:
      index: number of the call among all calls of all hosts.
      num_calls: all calls of all hosts.
      host: the host that makes it.
      first_replica: the first replica it feeds.
      num_replicas: how many replicas it feeds.
      batch_size: what its params['batch_size'] says, rows of each batch it yields; None without XLA where the Trainer
        was given none.
      batches_per_step: batches drawn from it each step; more than one in PER_HOST_V2, one a replica.
      splits: whether a batch is split over the replicas it feeds; if not, each replica gets a whole one.
    """

    index: int
    num_calls: int
    host: int
    first_replica: int
    num_replicas: int
    batch_size: int | None
    batches_per_step: int = 1
    splits: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class InputPlan:
    """The deployment of one mode's input.

    Attributes:
      calls: every call of input_fn, in order.
      replica_batch_size: rows of one replica's batch; what model_fn's params['batch_size'] says; None as above.
      broadcast: whether all replicas get the same rows, so that one replica's outputs are all there is.
    """

    calls: tuple[InputCall, ...]
    replica_batch_size: int | None
    broadcast: bool = False

    def on_host(self, host: int) -> tuple[InputCall, ...]:
        """The calls that one host makes."""
        return tuple(call for call in self.calls if call.host == host)


def deployment_of(mode: ModeKeys, config: TPUConfig) -> InputPipelineConfig:
    """Returns the deployment that applies to a mode.

    SLICED replaces every other one in eval and predict; per-core input is for training only.
    """
    if mode is not ModeKeys.TRAIN:
        if config.eval_training_input_configuration is InputPipelineConfig.SLICED:
            return InputPipelineConfig.SLICED
        if config.per_host_input_for_training is InputPipelineConfig.PER_SHARD_V1:
            return InputPipelineConfig.PER_HOST_V1
    return config.per_host_input_for_training


def plan_native_input(batch_size: int | None) -> InputPlan:
    """Returns the deployment without XLA: one call with the batch size as it is."""
    return InputPlan(calls=(InputCall(index=0, num_calls=1, host=0, first_replica=0, num_replicas=1,
                                      batch_size=batch_size),), replica_batch_size=batch_size)


def plan_input(
        mode: ModeKeys, config: TPUConfig, *, global_batch_size: int | None, num_hosts: int, num_replicas: int,
) -> InputPlan:
    """Returns the deployment of the input over hosts and replicas.

    Args:
      mode: the mode.
      config: names the deployment.
      global_batch_size: rows of one step over all replicas.
      num_hosts: hosts, each with the same number of replicas, or fewer replicas that span equally many hosts each.
      num_replicas: replicas over all hosts.

    Raises:
      ConfigError: the batch size is None, or not divisible by the number of replicas.

    Source: _InternalTPUContext of TPUEstimator.
    """
    name = _NAMES[mode]
    if global_batch_size is None:
        raise ConfigError(f"{name}_batch_size in TPUEstimator constructor cannot be `None` to {_VERBS[mode]}; "
                          f"pass {name}_batch_size to Trainer.")
    deployment = deployment_of(mode, config)
    if deployment is InputPipelineConfig.BROADCAST:
        call = InputCall(index=0, num_calls=1, host=0, first_replica=0, num_replicas=num_replicas,
                         batch_size=global_batch_size, splits=False)
        return InputPlan(calls=(call,), replica_batch_size=global_batch_size, broadcast=True)
    if global_batch_size % num_replicas:
        nearest = max(1, round(global_batch_size / num_replicas)) * num_replicas
        raise ConfigError(f"{name} batch size {global_batch_size} must be divisible by number of replicas "
                          f"{num_replicas}. Try {nearest}.")
    replica_batch_size = global_batch_size // num_replicas
    per_host = num_replicas // num_hosts
    if deployment is InputPipelineConfig.SLICED:
        calls = [InputCall(index=0, num_calls=1, host=0, first_replica=0, num_replicas=num_replicas,
                           batch_size=global_batch_size)]
    elif deployment is InputPipelineConfig.PER_SHARD_V1:
        calls = [InputCall(index=r, num_calls=num_replicas, host=r // per_host, first_replica=r, num_replicas=1,
                           batch_size=replica_batch_size) for r in range(num_replicas)]
    elif deployment is InputPipelineConfig.PER_HOST_V2 and num_replicas < num_hosts:
        # The host that has a replica's first core feeds it.
        calls = [InputCall(index=r, num_calls=num_replicas, host=r * (num_hosts // num_replicas), first_replica=r,
                           num_replicas=1, batch_size=replica_batch_size, splits=False) for r in range(num_replicas)]
    elif deployment is InputPipelineConfig.PER_HOST_V2:
        calls = [InputCall(index=h, num_calls=num_hosts, host=h, first_replica=h * per_host, num_replicas=per_host,
                           batch_size=replica_batch_size, batches_per_step=per_host, splits=False)
                 for h in range(num_hosts)]
    else:
        calls = [InputCall(index=h, num_calls=num_hosts, host=h, first_replica=h * per_host, num_replicas=per_host,
                           batch_size=global_batch_size // num_hosts) for h in range(num_hosts)]
    return InputPlan(calls=tuple(calls), replica_batch_size=replica_batch_size)


_VERBS = {ModeKeys.TRAIN: "train", ModeKeys.EVAL: "evaluate", ModeKeys.PREDICT: "predict"}
