"""Everything between a call of train, evaluate or predict and its first step: deployment, input, rehearsal."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tpuspec.config import RunConfig
from tpuspec.data.batch_axis import BatchAxis
from tpuspec.data.context import TPUContext
from tpuspec.data.deployment import plan_input, plan_native_input
from tpuspec.data.pipeline import HostBatch, InputPipeline, InputSettings
from tpuspec.data.position import Position, start_of
from tpuspec.data.prefetch import PrefetchedBatches
from tpuspec.data.random_state import ProcessRandomState
from tpuspec.data.structure import named_leaves
from tpuspec.errors import ConfigError, InputTypeError
from tpuspec.loops.agreement import InputEnd, agreed_input
from tpuspec.loops.rehearsal import Rehearsal, rehearse
from tpuspec.loops.session import Session
from tpuspec.loops.step import ForwardStep, ModelFnCall, TrainStep, check_unsigned
from tpuspec.spec.backend import CompiledStep, StepFunction
from tpuspec.spec.functions import check_model_fn_call
from tpuspec.spec.mode import ModeKeys
from tpuspec.spec.phase import in_phase
from tpuspec.spec.results import Batch
from tpuspec.spec.user_threads import USER_CODE

logger = logging.getLogger(__name__)


def warn_of_mixed_precision(batch: Batch, module: nn.Module | None) -> None:
    """Warns of float64 input for a model that has no float64 parameter: XLA's compiler refuses to mix them."""
    dtypes = {p.dtype for p in module.parameters()} if module is not None else set()
    if dtypes and torch.float64 not in dtypes and any(t.dtype == torch.float64 for t in batch.tensors()):
        logger.warning("input_fn yields float64, which is numpy's default, and the model's parameters are %s. XLA does "
                       "not mix them: cast in input_fn, array.astype('float32'), or in model_fn.",
                       ", ".join(sorted(map(str, dtypes))))


@contextlib.contextmanager
def _strings_named(batch: HostBatch) -> Iterator[None]:
    """Says what became of a column of strings that model_fn asks for."""
    try:
        yield
    except KeyError as error:
        if error.args and error.args[0] in batch.kept:
            traceback.clear_frames(error.__traceback__)  # tensors of model_fn would run with what runs next
            raise InputTypeError(
                f"features[{error.args[0]!r}] must be an array of numbers or booleans where model_fn uses it; got a "
                "column of strings, which stays on the host. Encode strings and objects as numbers in input_fn.",
            ) from error
        raise


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What a loop runs on.

    Attributes:
      batches: the input, from its first batch; to be closed.
      step: the step, ready to run.
      rehearsal: what the first spec says.
      copies: replicas that get the same rows: in BROADCAST all whose outputs this host has, else 1.
      input_end: ends the input of all hosts where this one stops.
      start: where each call of input_fn stands before the first batch; None at a start that needs no word.
      num_steps: steps for which the input has batches, where that is known.
      short_step: the one of them, counted from 1, whose batch has too few rows; None for none.
    """

    batches: PrefetchedBatches[HostBatch]
    step: CompiledStep
    rehearsal: Rehearsal
    copies: int
    input_end: InputEnd
    start: list[Position] | None
    num_steps: int | None = None
    short_step: int | None = None


class Preparation:
    """Prepares one call in two stages: the deployment when it is made, the input when it is run.

    Args:
      model_fn: the user's.
      params: the Trainer's.
      config: the run's settings.
      session: model and devices.
      mode: the mode.
      global_batch_size: rows of one step.
      on_xla: whether the session runs on XLA.
      seed: of a Dataset's shuffle.
      batch_axis: where the rows of each tensor of the input are.

    Raises:
      ConfigError: the batch size is missing or does not fit the replicas.
    """

    def __init__(self, *, model_fn: Callable[..., Any], params: Mapping[str, Any], config: RunConfig, session: Session,
                 mode: ModeKeys, global_batch_size: int | None, on_xla: bool, seed: int,
                 batch_axis: BatchAxis | None = None) -> None:
        self._model_fn, self._params, self._config = model_fn, params, config
        self._session, self._mode, self._on_xla, self._seed = session, mode, on_xla, seed
        self._batch_axis = batch_axis or BatchAxis()
        if session.backend.topology.mesh and not self._batch_axis.is_first:
            raise ConfigError("batch_axis puts rows on other axes than 0; a mesh splits the rows of axis 0. Leave "
                              "batch_axis out, and transpose in model_fn.")
        topology = session.backend.topology
        # Several hosts bring host tensors together as XLA's replicas do, so that metric_fn sees all rows.
        self._is_joined = on_xla or topology.num_hosts > 1
        self.plan = plan_native_input(global_batch_size) if not self._is_joined else plan_input(
            mode, config.tpu_config, global_batch_size=global_batch_size, num_hosts=topology.num_hosts,
            num_replicas=topology.num_replicas)

    def run(self, input_fn: Callable[..., Any], *, starts: list[Position] | None = None,
            strict_start: bool = True, restore_random: Callable[[], None] = lambda: None) -> Prepared:
        """Calls input_fn, checks its first batch, and rehearses model_fn on it.

        Args:
          input_fn: the user's.
          starts, strict_start: where the input goes on; see `InputSettings`.
          restore_random: puts back the random state that the first batch is drawn with.

        Raises:
          ConfigError, InputError, SpecError and kin: a rule is broken; nothing was compiled.
        """
        USER_CODE.ran()  # whatever ran between two calls
        session, mode = self._session, self._mode
        backend = session.backend
        settings = InputSettings(
            input_fn=input_fn, mode=mode, params=self._params, config=self._config, plan=self.plan,
            topology=backend.topology, static_shapes=backend.static_shapes, with_context=self._is_joined,
            seed=self._seed, starts=starts, strict_start=strict_start, batch_axis=self._batch_axis)
        made: list[InputPipeline] = []

        def make() -> InputPipeline:
            made.append(InputPipeline(settings))
            return made[0]

        with in_phase("input_fn"):
            batches, input_end = agreed_input(
                make, self._config.prefetch_batches, backend.coordinator, self.plan, backend.topology, mode)
        try:
            restore_random()
            random_state = ProcessRandomState.take()
            with in_phase("input_fn"):
                first = next(batches)
            if self._on_xla:
                for name, tensor in named_leaves(first.replicas[0]).items():
                    check_unsigned(name, [tensor])
            warn_of_mixed_precision(first.replicas[0], session.module)
            check_model_fn_call(self._model_fn, has_labels=first.replicas[0].labels is not None)
            call = self._model_fn_call()
            with _strings_named(first):
                rehearsal = rehearse(backend, session.replicas[0], call, backend.feed(first.replicas)[0],
                                     tried=session.tried_metrics, limits=settings.limits if self._on_xla else None)
            settings.limits.check(first.replicas)
            step = session.compiled_step(
                mode, self.make_step(),
                num_at_once=self._config.tpu_config.steps_per_execution if mode is ModeKeys.TRAIN else 1)
        except BaseException:
            batches.close()
            raise
        num_steps, short_step = made[0].end_of() if made and mode is ModeKeys.TRAIN else (None, None)
        return Prepared(
            num_steps=num_steps, short_step=short_step,
            start=starts if starts is not None else start_of(first.position),
            batches=PrefetchedBatches(
                # Several hosts ask one another for each batch, on the loop's thread; each draws its own ahead below.
                batches, num_batches=self._config.prefetch_batches if backend.topology.num_hosts == 1 else 0,
                first=[first], random_state=random_state),
            step=step, rehearsal=rehearsal, copies=self._num_copies(), input_end=input_end)

    def make_step(self) -> StepFunction:
        """Returns the step of one replica."""
        call = self._model_fn_call()
        return TrainStep(call=call) if self._mode is ModeKeys.TRAIN else ForwardStep(call=call)

    def _num_copies(self) -> int:
        if not self.plan.broadcast:
            return 1
        topology = self._session.backend.topology
        # The chief has the outputs of all hosts.
        return topology.num_replicas if topology.is_chief else topology.num_replicas_per_host

    def _model_fn_call(self) -> ModelFnCall:
        topology = self._session.backend.topology
        params = {**self._params, "use_tpu": self._on_xla}
        batch_size = self.plan.replica_batch_size
        if batch_size is not None:
            batch_size *= topology.replicas_per_program
            params["batch_size"] = batch_size
        if self._is_joined:
            params["context"] = TPUContext(
                num_hosts=topology.num_hosts, num_replicas=topology.num_replicas,
                num_cores_per_replica=self._config.tpu_config.num_cores_per_replica)
        return ModelFnCall(
            model_fn=self._model_fn, mode=self._mode, params=params, config=self._config, on_xla=self._is_joined,
            batch_size=batch_size if self._is_joined else None, num_replicas=topology.num_replicas)
