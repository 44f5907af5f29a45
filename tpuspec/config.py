"""RunConfig and TPUConfig: TPUEstimator's settings as plain dataclasses, which are Hydra structured configs too."""

from __future__ import annotations

import copy
import math
import numbers
import os
import re
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, Self, Union

from tpuspec.cluster import Cluster, read_cluster
from tpuspec.errors import ConfigError
from tpuspec.mesh import check_mesh, check_mesh_settings, check_partition_dims, cores_of
from tpuspec.precision import parse_precision

DEFAULT_SAVE_CHECKPOINTS_SECS = 600
DEFAULT_COMPILE_CACHE = "default"
_UNSET = "default"
_CORES_PER_REPLICA = (1, 2, 4, 8, 16, 32, 64, 128)
_SECONDS = {"s": 1, "m": 60, "h": 3600}


def compile_cache_folder(setting: str) -> Path:
    """Returns the folder that a `RunConfig.compile_cache` names."""
    if setting != DEFAULT_COMPILE_CACHE:
        return Path(setting).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tpuspec" / "xla"


class InputPipelineConfig(Enum):
    """How input_fn is deployed over hosts and replicas."""

    PER_SHARD_V1 = 1
    PER_HOST_V1 = 2
    PER_HOST_V2 = 3
    BROADCAST = 4
    SLICED = 5


class CaptureMode(Enum):
    """Whether steps are captured once and replayed, or traced each time."""

    auto = "auto"
    require = "require"
    off = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopLength:
    """A parsed iterations_per_loop: `value` steps ('count') or `value` seconds ('seconds')."""

    value: int
    unit: str


def _is_int(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def parse_iterations_per_loop(value: int | str) -> LoopLength:
    """Parses 100, '100', '30s', '10m' or '2h'.

    Raises:
      ConfigError: anything else; zero and leading zeros included.
    """
    match = re.fullmatch(r"([1-9][0-9]*)([smh]?)", str(value)) if _is_int(value) or isinstance(value, str) else None
    if match is None:
        raise ConfigError(
            "TPUConfig.iterations_per_loop: Value must be positive integer value or time-based value, a number "
            f"followed by s, m or h, such as '300s'; got {value!r}.")
    number, unit = int(match[1]), match[2]
    return LoopLength(value=number * _SECONDS[unit], unit="seconds") if unit else LoopLength(value=number, unit="count")


@dataclass
class TPUConfig:
    """Settings of the device loop and of the input deployment.

    Attributes:
      iterations_per_loop: steps between two loop boundaries (hooks, checkpoints), or a time such as '30s'.
      num_shards: number of replicas; None takes what is found.
      num_cores_per_replica: devices that share one model copy; None means 1, without model parallelism.
      per_host_input_for_training: deployment of input_fn in TRAIN; True is PER_HOST_V1, False PER_SHARD_V1.
      eval_training_input_configuration: PER_HOST_V1, or SLICED for eval and predict.
      input_partition_dims: one or two elements: how features (and labels) are split over a replica's cores.
      mesh: mesh axis -> its size, such as {'data': 2, 'model': 2}; the batch is split over 'data', whose size is the
        number of replicas. None makes one of num_shards and num_cores_per_replica.
      sharding: pattern of parameter names -> one entry a dimension: a mesh axis, a list of axes, or None.
      fsdp: whether parameters and optimizer state are split over 'data' too.
      initial_infeed_sleep_secs: seconds to wait before the first batch is drawn.
      host_call_every_n_steps: host_call runs in train on every n-th global step.
      steps_per_execution: training steps that run as one program, a loop on the device, for steps so short that
        starting a program costs more. Iterations_per_loop had better be a multiple of it.

    Raises:
      ConfigError: the first rule that is broken.

    Source: tf.tpu.experimental.TPUConfig.
    """

    iterations_per_loop: Union[int, str] = 2  # noqa: UP007 - OmegaConf reads typing.Union
    num_shards: int | None = None
    num_cores_per_replica: int | None = None
    per_host_input_for_training: Any = True
    eval_training_input_configuration: Any = InputPipelineConfig.PER_HOST_V1
    input_partition_dims: Any = None
    mesh: Any = None
    sharding: Any = None
    fsdp: bool = False
    initial_infeed_sleep_secs: int | None = None
    host_call_every_n_steps: int = 1
    steps_per_execution: int = 1

    def __post_init__(self) -> None:
        self.per_host_input_for_training = _input_pipeline(self.per_host_input_for_training)
        if self.eval_training_input_configuration in InputPipelineConfig.__members__:
            self.eval_training_input_configuration = InputPipelineConfig[self.eval_training_input_configuration]
        self.mesh = check_mesh(self.mesh)
        validate_tpu_config(self)

    @property
    def loop_length(self) -> LoopLength:
        """iterations_per_loop, parsed."""
        return parse_iterations_per_loop(self.iterations_per_loop)

    @property
    def cores_per_replica(self) -> int:
        """Devices that share one model copy."""
        return cores_of(self.mesh) if self.mesh is not None else self.num_cores_per_replica or 1

    @property
    def is_spmd(self) -> bool:
        """Whether one program computes on all devices, over tensors that are split between them."""
        return (self.mesh is not None or self.fsdp or self.sharding is not None or self.cores_per_replica > 1
                or self.input_partition_dims is not None)


def _input_pipeline(value: object) -> InputPipelineConfig:
    if isinstance(value, InputPipelineConfig):
        return value
    if isinstance(value, bool):
        return InputPipelineConfig.PER_HOST_V1 if value else InputPipelineConfig.PER_SHARD_V1
    if isinstance(value, str) and value in InputPipelineConfig.__members__:
        return InputPipelineConfig[value]
    raise ConfigError(
        f"per_host_input_for_training must be True, False or one of {', '.join(InputPipelineConfig.__members__)}; "
        f"got {value!r}.")


def validate_tpu_config(config: TPUConfig) -> None:
    """Checks a TPUConfig, in TPUEstimator's order.

    Raises:
      ConfigError: the first rule that is broken.
    """
    cores = config.num_cores_per_replica
    parse_iterations_per_loop(config.iterations_per_loop)
    if config.num_shards is not None and (not _is_int(config.num_shards) or config.num_shards <= 0):
        raise ConfigError(f"TPUConfig.num_shards must be positive, or None to take what is found; got "
                          f"{config.num_shards!r}.")
    check_partition_dims(config.input_partition_dims, knows_cores=cores is not None or config.mesh is not None,
                         is_per_host_v2=config.per_host_input_for_training is InputPipelineConfig.PER_HOST_V2)
    if cores is not None and not (_is_int(cores) and cores in _CORES_PER_REPLICA):
        raise ConfigError(
            f"num_cores_per_replica must be 1, 2, 4, 8, 16, 32, 64 or 128; got {cores}.")
    check_mesh_settings(config.mesh, num_shards=config.num_shards, num_cores_per_replica=cores,
                        sharding=config.sharding, fsdp=config.fsdp)
    if config.eval_training_input_configuration not in (InputPipelineConfig.PER_HOST_V1, InputPipelineConfig.SLICED):
        raise ConfigError(
            "eval_training_input_configuration must be PER_HOST_V1 or SLICED; got "
            f"{getattr(config.eval_training_input_configuration, 'name', config.eval_training_input_configuration)}.")
    if config.per_host_input_for_training is InputPipelineConfig.SLICED:
        raise ConfigError("per_host_input_for_training cannot be SLICED: that is for eval and predict. "
                          "Set eval_training_input_configuration=SLICED.")
    sleep = config.initial_infeed_sleep_secs
    if sleep is not None and (not _is_int(sleep) or sleep <= 0):
        raise ConfigError(f"initial_infeed_sleep_secs must be a positive int, or None; got {sleep!r}.")
    every = config.host_call_every_n_steps
    if not _is_int(every) or every < 1:
        raise ConfigError(f"host_call_every_n_steps must be a positive int; got {every!r}.")
    if not _is_int(config.steps_per_execution) or config.steps_per_execution < 1:
        raise ConfigError(f"steps_per_execution must be a positive int; got {config.steps_per_execution!r}.")
    length = config.loop_length
    if length.unit == "count" and length.value < config.steps_per_execution:
        raise ConfigError(f"iterations_per_loop={length.value} is shorter than steps_per_execution="
                          f"{config.steps_per_execution}: no loop has that many steps. Set it to a multiple of that.")


@dataclass
class RunConfig:
    """Settings of a run.

    Attributes:
      model_dir: folder of checkpoints and logs, or an address such as gs://bucket/run; None takes a temporary folder.
      seed: of torch's random state on host and devices, and of shuffled rows; None draws one. Python's and numpy's are
        the user's to seed.
      save_summary_steps: steps between summaries; None or 0 writes none.
      save_checkpoints_steps, save_checkpoints_secs: distance between checkpoints, one of the two; both None saves
        none. Setting the steps unsets the default of the seconds.
      keep_checkpoint_max: newest checkpoints to keep; None or 0 keeps all.
      keep_checkpoint_every_n_hours: keeps, besides, one checkpoint for every n hours of training.
      log_step_count_steps: steps between progress lines and throughput summaries; None for none.
      tpu_config: a TPUConfig.
      capture: a CaptureMode, or its name.
      precision: a Precision, or its name: fp32, bf16 or bf16-mixed; None leaves dtypes as the model and the input have
        them.
      prefetch_batches: host batches made ready ahead, on a thread, where drawing one takes long; 0 for none.
      compile_cache: folder for compiled programs that later runs need not compile again; 'default' is tpuspec/xla in
        the user's cache folder, None keeps none. A mesh on a CPU goes without.
      audit_every_steps: replayed steps between two traces that check that the step is still what was captured.
      host_queue_size: steps, or programs of several, whose host functions may wait; a full queue slows training.
      show_progress: whether train, evaluate and predict print a banner, a progress line and tables.
      async_checkpoints: whether training goes on while a checkpoint is written; with saving_listeners it waits.
      checkpoint_max_shard_bytes: tensors of more bytes are spread over several files; a larger tensor has its own.
      checkpoint_timeout_secs: longest time that the writing of one may take; None for no limit.
      stop_on_nan: whether a loss that is NaN or infinite ends training.
      allow_inexact_resume: whether a run may go on from a checkpoint though its input cannot be put back to where it
        stood; the input is then read from its start.
      device: 'cpu' or 'cuda', where use_tpu=False; None means 'cpu'.
      compile: whether torch.compile compiles the module, where use_tpu=False.
      heartbeat_seconds: silence after which a host counts as lost, where several compute together.
      grace_seconds: time from the first SIGINT or SIGTERM to the end of the process: half of it for the step, the
        input or a hook under way, the rest for the last save. What hangs then is ended, without a commit.
      hang_seconds: time without a step, a batch or host work after which the process ends with the stacks of all
        threads and exit code 4; None for never. Time in the code that reads from predict() does not count.
      compile_hang_seconds: the same while XLA compiles a step.
      task_type: 'worker', or 'evaluator' for a process outside the cluster that only evaluates.

    Raises:
      ConfigError: the first rule that is broken.

    Source: tf.estimator.RunConfig and tf.tpu.RunConfig.
    """

    model_dir: str | None = None
    seed: int | None = None
    save_summary_steps: int | None = 100
    save_checkpoints_steps: Union[int, str, None] = _UNSET  # noqa: UP007 - OmegaConf reads typing.Union
    save_checkpoints_secs: Union[int, float, str, None] = _UNSET  # noqa: UP007
    keep_checkpoint_max: int | None = 5
    keep_checkpoint_every_n_hours: float | None = 10000
    log_step_count_steps: int | None = 100
    tpu_config: TPUConfig = field(default_factory=TPUConfig)
    capture: Any = CaptureMode.auto
    precision: Any = None
    prefetch_batches: int = 2
    compile_cache: str | None = DEFAULT_COMPILE_CACHE
    audit_every_steps: int = 1000
    host_queue_size: int = 8
    show_progress: bool = True
    async_checkpoints: bool = True
    checkpoint_max_shard_bytes: int = 5_000_000_000
    checkpoint_timeout_secs: float | None = 1800.0
    stop_on_nan: bool = True
    allow_inexact_resume: bool = False
    device: str | None = None
    compile: bool = False
    heartbeat_seconds: float = 60.0
    grace_seconds: float = 15.0
    hang_seconds: float | None = 1800.0
    compile_hang_seconds: float | None = 7200.0
    task_type: str = "worker"

    def __post_init__(self) -> None:
        if self.save_checkpoints_secs == _UNSET:
            self.save_checkpoints_secs = (
                DEFAULT_SAVE_CHECKPOINTS_SECS if self.save_checkpoints_steps == _UNSET else None)
        if self.save_checkpoints_steps == _UNSET:
            self.save_checkpoints_steps = None
        if self.model_dir is not None:
            self.model_dir = _path(self.model_dir)
        self.capture = _capture_mode(self.capture)
        self.precision = parse_precision(self.precision)
        validate(self)

    @property
    def cluster(self) -> Cluster:
        """This process's place among the processes of the run."""
        return read_cluster(self.task_type)

    @property
    def is_chief(self) -> bool:
        """Whether this process writes checkpoints and summaries."""
        return self.cluster.is_chief

    def replace(self, **changes: Any) -> Self:
        """Returns a deep copy with `changes`, validated; setting one checkpoint distance unsets the other.

        Raises:
          ConfigError: an unknown name, or a rule is broken.
        """
        known = {f.name for f in fields(self)}
        for name in changes:
            if name not in known:
                raise ConfigError(f"Replacing {name} is not supported; it is no field of {type(self).__name__}.")
        values = {name: copy.deepcopy(getattr(self, name)) for name in known}
        steps, secs = changes.get("save_checkpoints_steps"), changes.get("save_checkpoints_secs")
        if steps is not None and "save_checkpoints_secs" not in changes:
            values["save_checkpoints_secs"] = None
        if secs is not None and "save_checkpoints_steps" not in changes:
            values["save_checkpoints_steps"] = None
        return type(self)(**(values | changes))


def _path(value: object) -> str:
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(f"model_dir must be a path; got {value!r}.")
    return os.fspath(value)


def _capture_mode(value: object) -> CaptureMode:
    if value is False:  # YAML reads a bare `off` so
        return CaptureMode.off
    try:
        return CaptureMode(value)
    except ValueError:
        raise ConfigError(f"capture must be auto, require or off; got {value!r}.") from None


_COUNTS = ("save_summary_steps", "save_checkpoints_steps", "keep_checkpoint_max", "log_step_count_steps")


def validate(config: RunConfig) -> None:
    """Checks a RunConfig; called once, when it is made.

    Raises:
      ConfigError: the first rule that is broken.
    """
    if config.model_dir == "":
        raise ConfigError("model_dir should be non-empty; got ''. Leave it None for a temporary folder.")
    if config.save_checkpoints_steps is not None and config.save_checkpoints_secs is not None:
        raise ConfigError(
            "save_checkpoints_steps and save_checkpoints_secs cannot be both set; got "
            f"{config.save_checkpoints_steps} and {config.save_checkpoints_secs}.")
    for name in _COUNTS:
        value = getattr(config, name)
        if value is not None and not (_is_int(value) and value >= 0):
            raise ConfigError(f"{name} should be >= 0, an int, or None; got {value!r}.")
    seconds = config.save_checkpoints_secs
    if seconds is not None and not (_is_number(seconds) and seconds >= 0):  # type: ignore[operator]
        raise ConfigError(f"save_checkpoints_secs should be >= 0, or None; got {seconds!r}.")
    hours = config.keep_checkpoint_every_n_hours
    if hours is not None and not (_is_number(hours) and hours > 0):
        raise ConfigError(f"keep_checkpoint_every_n_hours should be > 0, or None; got {hours!r}.")
    if config.seed is not None and not (_is_int(config.seed) and 0 <= config.seed < 2**63):
        raise ConfigError(f"seed must be integer, 0 .. 2**63 - 1, or None; got {config.seed!r}.")
    if not _is_int(config.prefetch_batches) or config.prefetch_batches < 0:
        raise ConfigError(f"prefetch_batches must be an int, 0 for none; got {config.prefetch_batches!r}.")
    if config.compile_cache is not None and (not isinstance(config.compile_cache, str) or not config.compile_cache):
        raise ConfigError("compile_cache must be a folder, 'default', or None for no cache; got "
                          f"{config.compile_cache!r}.")
    if not _is_int(config.audit_every_steps) or config.audit_every_steps < 1:
        raise ConfigError(f"audit_every_steps must be a positive int; got {config.audit_every_steps!r}.")
    if not _is_int(config.host_queue_size) or config.host_queue_size < 1:
        raise ConfigError(f"host_queue_size must be a positive int; got {config.host_queue_size!r}.")
    parse_precision(config.precision)
    if not isinstance(config.tpu_config, TPUConfig):
        raise ConfigError(f"tpu_config must be a TPUConfig; got {type(config.tpu_config).__name__}.")
    num_at_once = config.tpu_config.steps_per_execution
    if num_at_once > 1 and config.capture is CaptureMode.off:
        raise ConfigError(f"steps_per_execution={num_at_once} needs a captured step, and capture=off traces each one. "
                          "Set capture=auto, or steps_per_execution=1.")
    if not isinstance(config.show_progress, bool):
        raise ConfigError(f"show_progress must be True or False; got {config.show_progress!r}.")
    for name in ("async_checkpoints", "stop_on_nan", "allow_inexact_resume"):
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(f"{name} must be True or False; got {getattr(config, name)!r}.")
    shard_bytes = config.checkpoint_max_shard_bytes
    if not _is_int(shard_bytes) or shard_bytes < 1:
        raise ConfigError(f"checkpoint_max_shard_bytes must be a positive int; got {shard_bytes!r}.")
    timeout = config.checkpoint_timeout_secs
    if timeout is not None and not (_is_number(timeout) and timeout > 0):
        raise ConfigError(f"checkpoint_timeout_secs should be > 0, or None; got {timeout!r}.")
    for name in ("grace_seconds", "hang_seconds", "compile_hang_seconds"):
        value = getattr(config, name)
        if not (_is_number(value) and value > 0) and (value is not None or name == "grace_seconds"):
            or_none = "" if name == "grace_seconds" else ", or None for no limit"
            raise ConfigError(f"{name} should be > 0, in seconds{or_none}; got {value!r}.")
    if config.device not in (None, "cpu", "cuda"):
        raise ConfigError(f"device must be 'cpu' or 'cuda', or None; got {config.device!r}. use_tpu=True takes XLA's "
                          "devices.")
    if not isinstance(config.compile, bool):
        raise ConfigError(f"compile must be True or False; got {config.compile!r}.")
    if not _is_number(config.heartbeat_seconds) or config.heartbeat_seconds < 1:
        raise ConfigError(f"heartbeat_seconds must be a number >= 1; got {config.heartbeat_seconds!r}.")
    read_cluster(config.task_type)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(float(value))
