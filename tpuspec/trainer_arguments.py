"""Checks of the Trainer's arguments that need neither devices nor the user's functions."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from tpuspec.config import InputPipelineConfig, RunConfig
from tpuspec.errors import ConfigError, ConfigTypeError
from tpuspec.spec.counts import check_above_zero, check_int, check_positive_int
from tpuspec.spec.mode import ModeKeys

RESERVED_PARAMS = ("batch_size", "context")
LARGEST = "largest"


def check_config(config: object) -> RunConfig:
    """Returns the RunConfig.

    Raises:
      ConfigError: it is missing or something else.
    """
    if not isinstance(config, RunConfig):
        raise ConfigError(f"`config` must be provided with type `RunConfig`; got {type(config).__name__}.")
    return config


def check_params(params: Mapping[str, Any] | None) -> None:
    """Checks the user's params.

    Raises:
      ConfigTypeError: no mapping.
      ConfigError: a reserved key.
    """
    if params is None:
        return
    if not isinstance(params, Mapping):
        raise ConfigTypeError(f"params must be a dict; got {type(params).__name__}.")
    reserved = [key for key in RESERVED_PARAMS if key in params]
    if reserved:
        raise ConfigError(f"{reserved} are reserved keys in params, set by the Trainer. Pass batch sizes as "
                          "train_batch_size, eval_batch_size and predict_batch_size.")


def check_batch_sizes(config: RunConfig, *, train: int | None, evaluate: int | None, predict: int | None) -> None:
    """Checks the batch sizes for XLA, in TPUEstimator's order.

    Raises:
      ConfigTypeError: not an int.
      ConfigError: no train batch size, one that is not positive, or per-core input with model parallelism.
    """
    if train is None:
        raise ConfigError("`train_batch_size` cannot be `None`; pass the global batch size.")
    check_positive_int("train_batch_size", train)
    tpu = config.tpu_config
    is_parallel = tpu.num_cores_per_replica is not None or tpu.cores_per_replica > 1
    if tpu.per_host_input_for_training is InputPipelineConfig.PER_SHARD_V1 and is_parallel:
        raise ConfigError("Model parallelism only supports per host input for training. Set "
                          "per_host_input_for_training=True.")
    if evaluate is not None:
        check_positive_int("eval_batch_size", evaluate)
    if predict is not None:
        check_positive_int("predict_batch_size", predict)


def batch_size_of(mode: str, size: int | None) -> int | None:
    """Returns the batch size of a mode; an int of numpy's as one of Python's.

    Raises:
      ConfigTypeError: not an int.
      ConfigError: zero or negative.
    """
    if size is None:
        return None
    check_positive_int(f"the batch size of mode {str(mode)!r}", size)
    return int(size)


def check_modes(modes: Any) -> list[ModeKeys]:
    """Returns modes as what they are named by: 'train', 'eval', 'predict'.

    Raises:
      ConfigError: one has another name, or there is none.
    """
    names = {"train": ModeKeys.TRAIN, "eval": ModeKeys.EVAL, "predict": ModeKeys.PREDICT,
             ModeKeys.PREDICT: ModeKeys.PREDICT}
    given = [modes] if isinstance(modes, str) else list(modes)
    if not given or any(not isinstance(mode, str) or mode not in names for mode in given):
        raise ConfigError(f"modes of a plan are 'train', 'eval' and 'predict', at least one; got {given}.")
    return list(dict.fromkeys(names[mode] for mode in given))


def check_planned_batch(batch: Any) -> None:
    """Checks which batch a plan is of.

    Raises:
      ConfigError: it is neither None nor 'largest'.
    """
    if batch not in (None, LARGEST):
        raise ConfigError(f"the batch of a plan is {LARGEST!r}, or None for the batch size of the run; got {batch!r}. "
                          "Set train_batch_size for another one.")


def check_eval_steps(steps: Any, *, on_xla: bool) -> None:
    """Checks evaluate's steps; None runs to the end of the input.

    Raises:
      ConfigTypeError: not an int.
      ConfigError: zero or negative.
    """
    if steps is None:
        return
    if not on_xla:
        check_above_zero("steps", steps)
    check_positive_int("Eval steps", steps)


def resolve_model_dir(model_dir: str | os.PathLike[str] | None, config: RunConfig) -> RunConfig:
    """Returns a copy of the config with the folder of the run: given here, there, or a temporary one.

    Raises:
      ConfigTypeError: no path.
      ConfigError: both are given and differ.
    """
    if model_dir is not None and not isinstance(model_dir, str | os.PathLike):
        raise ConfigTypeError(f"model_dir must be a path; got {model_dir!r}.")
    given = os.fspath(model_dir) if model_dir is not None else ""
    if given and config.model_dir is not None and given != config.model_dir:
        raise ConfigError(f"`model_dir` are set both in constructor and `RunConfig`, but with different values: "
                          f"{given!r} and {config.model_dir!r}. Set one of them.")
    return config.replace(model_dir=given or config.model_dir or tempfile.mkdtemp(prefix="tpuspec-"))


def check_extensions(summary_writers: object, backend: object) -> None:
    """Checks the functions that make what stands beside, or in the place of, tpuspec's own.

    Raises:
      ConfigTypeError: one is no function.
    """
    if not isinstance(summary_writers, Sequence) or not all(map(callable, summary_writers)):
        raise ConfigTypeError("summary_writers must be a list of functions of a folder that return a SummaryWriter; got"
                              f" {summary_writers!r}. Pass [lambda folder: MyWriter(folder)].")
    if backend is not None and not callable(backend):
        raise ConfigTypeError("backend must be a function of the RunConfig that returns a Backend; got "
                              f"{type(backend).__name__}. Pass lambda config: MyBackend(config).")


def check_factories(model: object, optimizer: object, scheduler: object = None) -> None:
    """Checks what the Trainer builds the model, its optimizers and their schedules from.

    Raises:
      ConfigTypeError: neither a function nor, for the model, a module.
      ConfigError: an optimizer without a model, or a scheduler without an optimizer.
    """
    if model is not None and not callable(model):
        raise ConfigTypeError(f"model must be a function of params, or a torch.nn.Module; got {type(model).__name__}.")
    if optimizer is not None and not callable(optimizer):
        raise ConfigTypeError(
            "optimizer must be a function of (model, params), because the model moves to its device first; got "
            f"{type(optimizer).__name__}. Pass lambda model, params: torch.optim.SGD(model.parameters(), ...).")
    if optimizer is not None and model is None:
        raise ConfigError("optimizer needs a model to optimize: pass model=function of params, or a torch.nn.Module.")
    if scheduler is not None and not callable(scheduler):
        raise ConfigTypeError(
            "scheduler must be a function of (optimizer, params), because the Trainer makes the optimizer; got "
            f"{type(scheduler).__name__}. Pass lambda optimizer, params: CosineAnnealingLR(optimizer, ...).")
    if scheduler is not None and optimizer is None:
        raise ConfigError("scheduler needs an optimizer whose learning rate it sets: pass optimizer=function.")


def check_native_settings(config: RunConfig, *, all_on_xla: bool) -> None:
    """Checks that settings of plain PyTorch are given only where something runs by it.

    Raises:
      ConfigError: everything runs on XLA.
    """
    given = {"device": config.device, "compile": config.compile}
    ignored = [f"{name}={value!r}" for name, value in given.items() if value]
    if all_on_xla and ignored:
        raise ConfigError(f"{ignored[0]} has no effect with use_tpu=True: it is for plain PyTorch. Pass "
                          "use_tpu=False, or leave it out.")


def check_sliced(config: RunConfig, *, on_xla: bool) -> None:
    """Checks that the SLICED deployment of evaluation runs where it can.

    Raises:
      ConfigError: it is asked for on one process without XLA.
    """
    configured = config.tpu_config.eval_training_input_configuration
    if configured is InputPipelineConfig.SLICED and not on_xla and config.cluster.num_workers <= 1:
        raise ConfigError("Invalid TPUConfig `eval_training_input_configuration` value. SLICED mode only works on "
                          "use_tpu = True.")


def check_length(steps: int | None, max_steps: int | None) -> None:
    """Checks what says how long to train.

    Raises:
      ConfigError: both are given, or one is not above zero.
    """
    if steps is not None and max_steps is not None:
        raise ConfigError(f"Can not provide both steps and max_steps. Got {steps} and {max_steps}; pass one.")
    check_above_zero("steps", steps)
    check_above_zero("max_steps", max_steps)


def check_train_length(steps: int | None, max_steps: int | None, *, on_xla: bool) -> None:
    """Checks, where there is something to train, that the end is known and a whole number.

    Raises:
      ConfigError: on XLA neither is given.
      ConfigTypeError: one is not an int.
    """
    if on_xla and steps is None and max_steps is None:
        raise ConfigError("For TPU training, one of `steps` or `max_steps` must be set.")
    for name, value in (("Train steps", steps), ("Train max_steps", max_steps)):
        if value is not None:
            check_int(name, value)
