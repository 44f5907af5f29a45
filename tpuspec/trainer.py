"""Trainer: one model_fn on XLA devices, or in plain PyTorch: train, evaluate, predict."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
import os
import random
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, Self, TypeVar

from torch import nn

from tpuspec import trainer_arguments as arguments
from tpuspec.checkpoint.store import CheckpointStore
from tpuspec.config import LoopLength, RunConfig
from tpuspec.data.batch_axis import BatchAxis
from tpuspec.data.pipeline import HostBatch
from tpuspec.data.prefetch import PrefetchedBatches
from tpuspec.data.random_state import keeping_random_state
from tpuspec.errors import ConfigError
from tpuspec.files.location import is_remote
from tpuspec.loops.chief_store import store_of
from tpuspec.loops.evaluation_run import EvaluationRun
from tpuspec.loops.export import Exporting
from tpuspec.loops.hooks import check_hooks, check_listeners
from tpuspec.loops.interruption import Interruption, interruptible
from tpuspec.loops.memory import explain_out_of_memory
from tpuspec.loops.model_source import ModelSource
from tpuspec.loops.planning import Planning
from tpuspec.loops.prediction_run import PredictionRun
from tpuspec.loops.prepare import Preparation
from tpuspec.loops.report import banner_facts, layout_of
from tpuspec.loops.run_position import RunPosition, read_random_state
from tpuspec.loops.saving import Saver, make_manager, make_policy, saves_in_pieces
from tpuspec.loops.session import Session
from tpuspec.loops.training_run import TrainingRun
from tpuspec.loops.variables import ReadsVariables
from tpuspec.loops.warm_start import warm_start
from tpuspec.loops.watchdog import Watchdog, make_watchdog
from tpuspec.loops.watched import watched, watched_generator
from tpuspec.loops.weights import borrowed_weights, read_for_training, restore_for_training
from tpuspec.plan.plan import Plan
from tpuspec.schedule.history import read_eval_metrics
from tpuspec.select import may_span_hosts, select, select_topology
from tpuspec.spec.backend import Backend
from tpuspec.spec.counts import check_int
from tpuspec.spec.functions import InputFn, ModelFactory, ModelFn, OptimizerFactory, SchedulerFactory, check_model_fn
from tpuspec.spec.hooks import CheckpointSaverListener, SessionRunHook
from tpuspec.spec.mode import ModeKeys
from tpuspec.spec.names import check_name
from tpuspec.spec.results import EvalResult
from tpuspec.spec.scaffold import Scaffold
from tpuspec.spec.warm_start import WarmStartSettings, check_warm_start
from tpuspec.summary import create_file_writer
from tpuspec.summary.multi import MultiWriter
from tpuspec.summary.progress import Progress
from tpuspec.summary.writer import SummaryWriter

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Trainer(ReadsVariables):
    """Drives XLA devices, or plain PyTorch on a CPU or a GPU, with one model_fn.

    Args:
      model_fn: builds one step; see `tpuspec.ModelFn`.
      model: function of params that returns the module, or the module itself.
      optimizer: function of (module, params) that returns an optimizer, or a dict of several by name.
      scheduler: function of (what optimizer returned, params) that returns a torch.optim.lr_scheduler schedule, or a
        dict of several; stepped after each update, a ReduceLROnPlateau after each evaluation. None leaves the learning
        rates as they are.
      model_dir: folder of checkpoints and logs, or an address of fsspec such as gs://bucket/run; None takes
        config.model_dir, or a temporary folder.
      config: a RunConfig.
      params: values for the user's functions; 'batch_size' and 'context' are reserved.
      use_tpu: XLA devices if true; plain PyTorch on config.device if not.
      train_batch_size, eval_batch_size, predict_batch_size: global batch sizes, rows over all replicas.
      batch_axis: the axis of the rows in the input's tensors; see `tpuspec.data.batch_axis.BatchAxis`.
      eval_on_tpu: False evaluates in plain PyTorch, on config.device.
      export_to_tpu, export_to_cpu: whether `export` makes a program for XLA devices, and one for CPUs and GPUs.
      summary_writers: functions of a folder (model_dir, or one of its eval folders) that return further
        `tpuspec.summary.SummaryWriter`s, which get what TensorBoard gets; called on the chief, once a call.
      backend: function of the RunConfig that returns another `tpuspec.spec.backend.Backend` to run on, in the place of
        XLA, or with use_tpu=False of plain PyTorch.
      warm_start_from: weights to begin with where model_dir has no checkpoint: a path, or a
        `tpuspec.WarmStartSettings`.

    Raises:
      ConfigError, ConfigTypeError: an argument breaks a rule.

    Source: tf.estimator.tpu.TPUEstimator.
    """

    def __init__(
            self, model_fn: ModelFn, *, model: ModelFactory | nn.Module | None = None,
            optimizer: OptimizerFactory | None = None, scheduler: SchedulerFactory | None = None,
            model_dir: str | os.PathLike[str] | None = None, config: RunConfig | None = None,
            params: Mapping[str, Any] | None = None, use_tpu: bool = True,
            train_batch_size: int | None = None, eval_batch_size: int | None = None,
            predict_batch_size: int | None = None, batch_axis: Any = None, eval_on_tpu: bool = True,
            export_to_tpu: bool = True, export_to_cpu: bool = True,
            warm_start_from: str | os.PathLike[str] | WarmStartSettings | None = None,
            summary_writers: Sequence[Callable[[str], SummaryWriter]] = (),
            backend: Callable[[RunConfig], Backend] | None = None) -> None:
        checked = arguments.check_config(config)
        arguments.check_params(params)
        if use_tpu:
            arguments.check_batch_sizes(
                checked, train=train_batch_size, evaluate=eval_batch_size, predict=predict_batch_size)
        arguments.check_native_settings(checked, all_on_xla=use_tpu and eval_on_tpu)
        check_model_fn(model_fn, params_given=params is not None)
        self._config = arguments.resolve_model_dir(model_dir, checked)
        self._params = copy.deepcopy(dict(params or {}))
        arguments.check_factories(model, optimizer, scheduler)
        arguments.check_extensions(summary_writers, backend)
        self._summary_writers, self._make_backend = tuple(summary_writers), backend
        self._batch_sizes = {ModeKeys.TRAIN: train_batch_size, ModeKeys.EVAL: eval_batch_size,
                             ModeKeys.PREDICT: predict_batch_size}
        self._batch_axis = BatchAxis(batch_axis)
        self._use_tpu = use_tpu
        self._eval_on_tpu = eval_on_tpu
        self._export_to_tpu, self._export_to_cpu = export_to_tpu, export_to_cpu
        self._source = ModelSource(model=model, optimizer=optimizer, scheduler=scheduler, params=self._params,
                                   read_evaluations=lambda name: read_eval_metrics(self._eval_dir(name)))
        self._warm_start_from = check_warm_start(warm_start_from)
        self._model_fn = model_fn
        self._seed = random.getrandbits(31) if self._config.seed is None else int(self._config.seed)
        self._sessions: dict[bool, Session] = {}
        self._store = CheckpointStore(self.model_dir, max_shard_bytes=self._config.checkpoint_max_shard_bytes)
        if is_remote(self.model_dir):  # file:// is a folder of this machine
            self._config = self._config.replace(model_dir=os.fspath(self._store.model_dir))
        self._progress = Progress(enabled=self._config.show_progress and self._config.cluster.task_index == 0)
        self._training_input: PrefetchedBatches[HostBatch] | None = None
        self._interruption: Interruption | None = None

    @property
    def model_dir(self) -> str:
        """Folder of checkpoints and logs."""
        assert self._config.model_dir is not None, "set by resolve_model_dir"
        return self._config.model_dir

    @property
    def is_chief(self) -> bool:
        """Whether this process writes checkpoints, summaries and progress; on a TPU pod the hosts meet to know it."""
        if may_span_hosts(self._config, use_tpu=self._use_tpu):
            return self._session(self._use_tpu).backend.coordinator.is_chief
        return self._config.is_chief

    @property
    def config(self) -> RunConfig:
        """A deep copy of the settings."""
        return copy.deepcopy(self._config)

    @property
    def params(self) -> dict[str, Any]:
        """A deep copy of the user's params."""
        return copy.deepcopy(self._params)

    def global_step(self) -> int:
        """Completed updates of the newest state: the model in memory, or the newest checkpoint."""
        session, path = self._sessions.get(self._use_tpu), self._store.latest()
        live = 0 if session is None else session.global_step
        return live if path is None else max(live, self._store.read_step(path))

    def agree(self, value: T) -> T:
        """Returns the chief's value (JSON or tensors) on every host, where several compute together; all call it."""
        if not may_span_hosts(self._config, use_tpu=self._use_tpu):
            return value
        return self._session(self._use_tpu).backend.coordinator.share(value)

    @watched
    def train(self, input_fn: InputFn, hooks: Iterable[SessionRunHook] | None = None,
              steps: int | None = None, max_steps: int | None = None,
              saving_listeners: Iterable[CheckpointSaverListener] | None = None) -> Self:
        """Trains from the newest checkpoint, or from the start.

        Args:
          input_fn: makes the input; see `tpuspec.InputFn`.
          hooks: called at every loop boundary.
          steps: updates to add.
          max_steps: global step to end at; if it is reached, nothing is done.
          saving_listeners: called around each checkpoint.

        Raises:
          ConfigError, ConfigTypeError, SpecError, InputError and kin: a rule is broken, before anything is compiled.
          HostCallError: host_call raised; names the step.
          KeyboardInterrupt, SystemExit: SIGINT or SIGTERM (then with code 143) came; raised after the step under way
            was finished and the last checkpoint saved. A second signal ends training at once. Signals are taken in the
            main thread only, and the handlers that were there before are put back. After SIGTERM the process is ended
            by force when config.grace_seconds are over.
          Exception: of input_fn, model_fn or a hook, as it is.
        """
        if self._training_input is not None:
            raise ConfigError("train() was called by a hook or listener of train(). Call it after the first has ended.")
        if self._config.cluster.task_type == "evaluator":
            raise ConfigError("Trainer.train is not for a process with task_type='evaluator', which only evaluates; "
                              "use train_and_evaluate there, or task_type='worker'.")
        arguments.check_length(steps, max_steps)
        newest_step = self.agree(self.global_step())
        if max_steps is not None and newest_step >= max_steps:
            check_int("Train max_steps", max_steps)
            self._progress.message(f"training is complete: global step {newest_step} of {max_steps}.")
            return self
        checked_hooks = check_hooks(hooks)
        session = self._session(self._use_tpu)
        preparation = self._prepare(session, ModeKeys.TRAIN, on_xla=self._use_tpu)
        arguments.check_train_length(steps, max_steps, on_xla=self._use_tpu)
        checked_listeners = check_listeners(saving_listeners)
        if checked_listeners and not make_policy(self._config, session.backend.coordinator).enabled:
            raise ConfigError("There should be a CheckpointSaverHook to use saving_listeners: set "
                              "save_checkpoints_steps or save_checkpoints_secs.")
        with (store_of(self._store, session.backend.coordinator).writing(),
              interruptible(self._config.grace_seconds) as self._interruption,
              self._interruption.stops(lambda: None)):  # what came before the loop stops it at its first step
            self._train(session, preparation, input_fn, checked_hooks, checked_listeners, steps, max_steps,
                        self._interruption)
        return self

    def _train(self, session: Session, preparation: Preparation, input_fn: InputFn,
               hooks: Sequence[SessionRunHook], listeners: Sequence[CheckpointSaverListener], steps: int | None,
               max_steps: int | None, interruption: Interruption) -> None:
        save_policy = make_policy(self._config, session.backend.coordinator)
        store = store_of(self._store, session.backend.coordinator)
        session.check_not_lent("train()")
        session.ensure_optimizers()
        session.drop_gradients()
        session.set_training(True)
        state = read_for_training(session, store)
        run = RunPosition.of(session, state, exact=not self._config.allow_inexact_resume)
        prepared = preparation.run(input_fn, starts=run.input, strict_start=run.strict, restore_random=run.set_host)
        restore_for_training(session, state, prepared.rehearsal.scaffold,
                             reads_module=bool(hooks or listeners or prepared.rehearsal.hooks))
        restored = session.global_step in store.steps()
        # Without a state to go on from: the same seed at the same step, whatever input_fn and model_fn drew before.
        if not run.set_devices(session.backend):
            session.backend.seed(self._seed + session.global_step)
        session.input_position, session.random_state = prepared.start, None
        last_step = max_steps if steps is None else session.global_step + steps
        # Without XLA hooks fire per step: each step is a loop of its own.
        length = self._config.tpu_config.loop_length if self._use_tpu else LoopLength(value=1, unit="count")
        in_pieces = saves_in_pieces(session, store, prepared.rehearsal.scaffold)
        training = TrainingRun(
            session=session, prepared=prepared, config=self._config, loop_length=length, progress=self._progress,
            restored=restored, interruption=interruption, hooks=[*hooks, *prepared.rehearsal.hooks],
            saver=Saver(make_manager(self._config, self._store, save_policy, session.backend.coordinator,
                                     jointly=in_pieces), save_policy,
                        lambda: session.training_state(prepared.rehearsal.scaffold, prepared.batches.random_state(),
                                                       in_pieces=in_pieces),
                        listeners, reads_tensors=not in_pieces))
        self._banner(session)
        with contextlib.closing(prepared.batches), contextlib.closing(
                self._writer(session, self.model_dir, session.global_step)) as writer:
            self._training_input = prepared.batches
            try:
                training.run(writer, last_step)
                session.random_state = read_random_state(session.backend, prepared.batches.random_state())
            finally:
                self._training_input = None
        if interruption.signal is not None:
            told = (f"stopped at step {session.global_step}, newest checkpoint {self.latest_checkpoint()}. The next "
                    "train() goes on from there.")
            self._progress.message(f"interrupted: {told}")
            interruption.end(told)

    @watched
    def evaluate(self, input_fn: InputFn, steps: int | None = None,
                 hooks: Iterable[SessionRunHook] | None = None, checkpoint_path: str | os.PathLike[str] | None = None,
                 name: str | None = None) -> EvalResult:
        """Evaluates the newest weights, or a checkpoint's, over the whole input.

        Args:
          input_fn: makes the input.
          steps: batches at most; None runs to the end.
          hooks: called once around all steps; with use_tpu=False around each.
          checkpoint_path: folder of a checkpoint; None takes the newest weights, which without a checkpoint are the
            initial ones.
          name: of this evaluation; its logs go to model_dir/eval_<name>.

        Returns:
          Metric name -> value over all real rows, with 'loss', the mean over them, and 'global_step'.

        Raises:
          ConfigError, ConfigTypeError, SpecError, InputError and kin: a rule is broken, before anything is compiled.
          HostCallError: metric_fn or host_call raised; names the step.
          KeyboardInterrupt, SystemExit: SIGINT or SIGTERM came, as in train; raised after the step under way.
        """
        on_xla = self._use_tpu and self._eval_on_tpu
        if self._eval_on_tpu and not self._use_tpu:
            logger.warning("eval_on_tpu ignored because use_tpu is False.")
            self._eval_on_tpu = False  # said once
        checked_hooks = check_hooks(hooks)
        arguments.check_sliced(self._config, on_xla=on_xla)
        session = self._session(on_xla)
        preparation = self._prepare(session, ModeKeys.EVAL, on_xla=on_xla)
        arguments.check_eval_steps(steps, on_xla=on_xla)
        session.check_not_lent("evaluate()")
        store_of(self._store, session.backend.coordinator).check_writable()
        folder = self._eval_dir(name)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._training_paused())
            stack.enter_context(session.evaluating(self._seed))
            prepared = preparation.run(input_fn)
            stack.enter_context(contextlib.closing(prepared.batches))
            evaluated = stack.enter_context(self._weights(session, checkpoint_path, prepared.rehearsal.scaffold))
            stack.enter_context(session.with_buffers_of_chief())
            writer = stack.enter_context(contextlib.closing(self._writer(session, folder)))
            self._interruption = stack.enter_context(interruptible(self._config.grace_seconds))
            # The line of a training that this evaluation interrupts stays.
            progress = Progress(enabled=False) if self._training_input is not None else self._progress
            self._banner(session)
            result, num_rows = EvaluationRun(
                session=session, prepared=prepared, hooks=[*checked_hooks, *prepared.rehearsal.hooks],
                hooks_per_step=not on_xla, queue_size=self._config.host_queue_size,
                title=f"eval{f' {name}' if name else ''}", progress=progress,
                interruption=self._interruption).run(writer, steps, evaluated)
        self._progress.table(f"evaluation{f' {name}' if name else ''} of {num_rows} rows at step "
                             f"{result['global_step']}", result)
        if (training := self._sessions.get(self._use_tpu)) is not None:
            training.evaluated(name or None, result)
        return result

    def _eval_dir(self, name: str | None) -> str:
        # Also where model_dir is an address, which Path would spoil.
        return os.path.join(self.model_dir, f"eval_{check_name(name)}" if name else "eval")

    @watched_generator
    def predict(self, input_fn: InputFn, predict_keys: Sequence[str] | None = None,
                hooks: Iterable[SessionRunHook] | None = None,
                checkpoint_path: str | os.PathLike[str] | None = None,
                yield_single_examples: bool = True) -> Generator[Any, None, None]:
        """Yields predictions in the order of the input; nothing happens before the first is asked for.

        Args:
          input_fn: makes the input; labels are dropped.
          predict_keys: names to yield; None yields all.
          hooks: called once per batch.
          checkpoint_path: as in evaluate.
          yield_single_examples: rows, {name: array [...]}; if false batches, {name: array [batch, ...]}.

        Raises:
          As evaluate, from the first next().
        """
        checked_hooks = check_hooks(hooks)
        arguments.check_sliced(self._config, on_xla=self._use_tpu)
        session = self._session(self._use_tpu)
        preparation = self._prepare(session, ModeKeys.PREDICT, on_xla=self._use_tpu)
        session.check_not_lent("predict()")
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._training_paused())
            stack.enter_context(session.evaluating(self._seed))
            prepared = preparation.run(input_fn)
            stack.enter_context(contextlib.closing(prepared.batches))
            stack.enter_context(self._weights(session, checkpoint_path, prepared.rehearsal.scaffold))
            stack.enter_context(session.lent())
            writer = stack.enter_context(contextlib.closing(
                self._writer(session, os.path.join(self.model_dir, "predict"))))
            yield from PredictionRun(
                session=session, prepared=prepared, hooks=[*checked_hooks, *prepared.rehearsal.hooks],
                queue_size=self._config.host_queue_size, predict_keys=predict_keys,
                yield_single_examples=yield_single_examples).run(writer)

    @watched
    def export(self, export_dir_base: str | os.PathLike[str], serving_input_fn: Callable[..., Any],
               checkpoint_path: str | os.PathLike[str] | None = None, *,
               assets_extra: Mapping[str, str | os.PathLike[str]] | None = None,
               metrics: EvalResult | None = None) -> str:
        """Exports the model for serving; `tpuspec.export.load` loads it. All hosts call it, and the chief writes.

        Args:
          export_dir_base: folder of this machine; the export is its folder <seconds since 1970>, whole or not there.
          serving_input_fn: returns a `tpuspec.ServingInputReceiver`; may take params.
          checkpoint_path: as in evaluate, but initial weights are not exported, unless they are those of a warm start.
          assets_extra: place below assets.extra -> file to copy there.
          metrics: what an evaluation of these weights gave, to be kept with them.

        Returns:
          The folder of the export; '' on hosts that are not the chief.

        Raises:
          ConfigError, ConfigTypeError, SpecError and kin: a rule is broken, or there is no trained model.
          CheckpointError: the checkpoint cannot be read, or does not fit.
          ExportError: model_fn cannot be traced in mode PREDICT, or the export not be written.
          KeyboardInterrupt, SystemExit: SIGINT or SIGTERM came, at once; there is no export then.
        """
        spans_hosts = may_span_hosts(self._config, use_tpu=self._use_tpu)
        trained = self._session(self._use_tpu) if spans_hosts else self._sessions.get(self._use_tpu)
        return Exporting(
            model_fn=self._model_fn, config=self._config, source=self._source, store=self._store, trained=trained,
            to_cpu=self._export_to_cpu, to_tpu=self._export_to_tpu, progress=self._progress,
            warm_start=None if self._warm_start_from is None else self._warm_start,
        ).run(export_dir_base, serving_input_fn, checkpoint_path, assets_extra, metrics)

    def plan(self, input_fn: InputFn, *, topology: str, modes: Sequence[ModeKeys | str] = (ModeKeys.TRAIN,),
             batch: str | None = None) -> Plan:
        """Compiles the steps of a run for TPU chips that are not there, and says what they would need.

        Nothing runs, no checkpoint is read or written, and the Trainer's own model stays as it is. What the programs
        need depends on shapes: parameters and the optimizer's state take no memory here.

        Args:
          input_fn: makes the input; one batch of each mode is drawn.
          topology: a TPU generation and its chips along each side, such as 'v5e:2x2', 'v5e:4x4' or 'v5p:2x2x1'.
          modes: to plan.
          batch: 'largest' looks for the largest global batch of each mode that fits, from the batch size on, and plans
            that; None plans the batch size.

        Raises:
          ConfigError: there is no such topology, the settings do not fit it, a step cannot be captured, or it takes no
            other number of rows than the batch size.
          DeviceError: libtpu is missing.
          InputError, SpecError and kin: as in train.
        """
        chosen = arguments.check_modes(modes)
        arguments.check_planned_batch(batch)
        with keeping_random_state():
            backend, chips = select_topology(self._config, topology)
            session = Session(backend, self._source.without_memory(), seed=self._seed,
                              precision=self._config.precision)
            planning = Planning(session=session, chips=chips, topology=topology, seed=self._seed,
                                batch_axis=self._batch_axis,
                                num_at_once=self._config.tpu_config.steps_per_execution)
            plans = [planning.run(
                mode, functools.partial(self._prepare, session, mode, on_xla=True), input_fn, self._batch_sizes[mode],
                largest=batch is not None) for mode in chosen]
        notes = (f"on these chips jax goes with {chips.other_compiler}, and {chips.compiler} compiled this plan: their "
                 "programs may differ.",) if chips.other_compiler else ()
        return Plan(topology=topology, chip=chips.kind, num_chips=chips.num_chips, num_devices=chips.num_devices(),
                    layout=layout_of(backend.topology), modes=tuple(plans), compiler=chips.compiler, notes=notes)

    def _copied_source(self) -> ModelSource:
        """Returns where another model comes from: the user's own module lives on the training devices."""
        if not isinstance(self._source.model, nn.Module):
            return self._source
        return dataclasses.replace(self._source, model=copy.deepcopy(self._source.model).cpu())

    def _training_paused(self) -> contextlib.AbstractContextManager[None]:
        """Lets the input of a training that this call interrupts rest: the random state is another one meanwhile."""
        return contextlib.nullcontext() if self._training_input is None else self._training_input.paused()

    def _session(self, on_xla: bool) -> Session:
        """Returns the model on the devices of one kind; built on first use."""
        if on_xla not in self._sessions:
            source = self._source if on_xla == self._use_tpu else self._copied_source()
            if not on_xla and self._use_tpu and may_span_hosts(self._config, use_tpu=True):
                self._session(True)  # the hosts of a pod meet over its devices, also to evaluate without them
            backend = (self._make_backend(self._config) if self._make_backend is not None and on_xla == self._use_tpu
                       else select(self._config, use_tpu=on_xla))
            if not backend.coordinator.is_chief:
                self._progress = Progress(enabled=False)
            if not self._sessions:
                self._seed = backend.coordinator.share(self._seed)
            # The first one starts from the seed; a second one leaves a training under way its random state.
            own = keeping_random_state() if self._sessions else contextlib.nullcontext()
            if self._warm_start_from is not None and backend.coordinator.share(self._store.latest() is None):
                source = dataclasses.replace(source, warm_start=self._warm_start)
            with self._training_paused(), own:
                self._sessions[on_xla] = Session(backend, source, seed=self._seed, precision=self._config.precision)
        return self._sessions[on_xla]

    def _warm_start(self, module: nn.Module | None) -> None:
        assert self._warm_start_from is not None, "asked where it is set"
        warm_start(module, self._warm_start_from, self._progress.message)

    def _writer(self, session: Session, folder: str, after_step: int | None = None) -> SummaryWriter:
        """Returns the writer of a folder; on hosts that are not the chief one that discards all."""
        if not session.backend.coordinator.is_chief:
            return MultiWriter(())
        return MultiWriter([create_file_writer(folder, after_step), *(make(folder) for make in self._summary_writers)])

    def _watchdog(self) -> Watchdog:
        """Returns what watches one call."""
        return make_watchdog(self._config, self._report)

    def _report(self, error: BaseException, phase: str) -> None:
        """Tells the other hosts of an error that ends this one's call."""
        is_agreed = self._interruption is not None and self._interruption.is_agreed
        if is_agreed and isinstance(error, KeyboardInterrupt | SystemExit):
            return
        for session in self._sessions.values():
            explain_out_of_memory(error, phase, self._batch_sizes, session.backend.topology.num_replicas)
            session.backend.coordinator.report(error, phase)

    def _prepare(self, session: Session, mode: ModeKeys, num_rows: int | None = None, *, on_xla: bool) -> Preparation:
        num_rows = self._batch_sizes[mode] if num_rows is None else num_rows
        return Preparation(
            model_fn=self._model_fn, params=self._params, config=self._config, session=session, mode=mode,
            global_batch_size=arguments.batch_size_of(mode, num_rows), on_xla=on_xla,
            seed=self._seed, batch_axis=self._batch_axis)

    def _weights(self, session: Session, checkpoint_path: str | os.PathLike[str] | None, scaffold: Scaffold,
                 ) -> contextlib.AbstractContextManager[str | None]:
        return borrowed_weights(session, self._sessions.get(self._use_tpu),
                                store_of(self._store, session.backend.coordinator), checkpoint_path, scaffold)

    def _banner(self, session: Session) -> None:
        self._progress.banner("tpuspec", banner_facts(
            session, model_dir=self.model_dir, batch_sizes=self._batch_sizes, seed=self._seed))
