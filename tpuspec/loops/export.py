"""One export: weights are chosen and held, model_fn is traced with them on the host, and the bundle is committed."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tpuspec.checkpoint.restore import load_into_module
from tpuspec.checkpoint.state import storable_tensors
from tpuspec.checkpoint.store import CheckpointStore
from tpuspec.checkpoint.tensors import encode_tensors
from tpuspec.config import RunConfig
from tpuspec.data.random_state import keeping_random_state
from tpuspec.errors import CheckpointError, ConfigError, ConfigTypeError, ExportError
from tpuspec.export.bundle import CPU_TAGS, TPU_TAGS, check_assets, check_metrics, write_bundle
from tpuspec.export.program import ServingProgram, trace
from tpuspec.export.receiver import ServingInputReceiver, check_serving_input_fn
from tpuspec.export.signature import flatten_output, rebuild_output
from tpuspec.loops.chief_store import store_of
from tpuspec.loops.export_folder import check_base, commit_next, writing_into
from tpuspec.loops.interruption import Interruption, interruptible
from tpuspec.loops.model_source import ModelSource
from tpuspec.loops.session import Session
from tpuspec.loops.step import ModelFnCall
from tpuspec.loops.weights import check_ready, choosing_weights
from tpuspec.precision import cast_module, cast_tensor, for_host
from tpuspec.spec.backend import Replica
from tpuspec.spec.estimator_spec import EstimatorSpec
from tpuspec.spec.export_output import ExportOutput
from tpuspec.spec.functions import call_by_name
from tpuspec.spec.mode import ModeKeys
from tpuspec.spec.phase import in_phase, note_move
from tpuspec.spec.results import Batch
from tpuspec.spec.scaffold import Scaffold, make_scaffold
from tpuspec.summary.progress import Progress

_HOST = torch.device("cpu")


class UnfitCheckpointError(CheckpointError, ValueError):
    """A checkpoint does not hold the weights that an export needs, or in other shapes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exporting:
    """Exports of one Trainer.

    Attributes:
      model_fn, config, source: of the Trainer.
      store: of its checkpoints.
      trained: the session with the newest weights in memory; None before any training, where this is the only host.
      to_cpu, to_tpu: whether there is a program for CPUs and GPUs, and one for XLA devices.
      progress: tells of the export.
      warm_start: loads the weights to export where nothing was trained; None where there are none.
    """

    model_fn: Callable[..., Any]
    config: RunConfig
    source: ModelSource
    store: CheckpointStore
    trained: Session | None
    to_cpu: bool
    to_tpu: bool
    progress: Progress
    warm_start: Callable[[nn.Module | None], None] | None = None

    def run(self, base: str | os.PathLike[str], serving_input_fn: Callable[..., Any],
            checkpoint_path: str | os.PathLike[str] | None, assets_extra: Mapping[str, Any] | None,
            metrics: Mapping[str, Any] | None) -> str:
        """Exports; see `Trainer.export`. Returns the folder.

        Raises:
          ConfigError, ConfigTypeError: an argument breaks a rule, or there is no trained model.
          CheckpointError: the checkpoint cannot be read, or does not fit.
          ExportError: model_fn cannot be traced, or the files not be written.
          KeyboardInterrupt, SystemExit: a signal came; nothing was exported.
        """
        variants, assets, kept_metrics = self._variants(), check_assets(assets_extra), check_metrics(metrics)
        coordinator = None if self.trained is None else self.trained.backend.coordinator
        is_chief = coordinator is None or coordinator.is_chief
        if checkpoint_path is not None:  # the chief has all that it takes
            coordinator = None
            if not is_chief:
                return ""
        store = self.store if coordinator is None else store_of(self.store, coordinator)
        if self.trained is not None:
            self.trained.check_not_lent("export()")
        with interruptible(self.config.grace_seconds) as interruption, keeping_random_state(), \
                choosing_weights(self.trained, store, checkpoint_path) as chosen:
            is_untrained = chosen.path is None and chosen.live is None
            if is_untrained and self.warm_start is None:
                raise ConfigError(f"Couldn't find trained model at {self.store.model_dir}: train first, or give "
                                  "checkpoint_path.")
            where = chosen.holder or "memory"
            with _noting_interruption(interruption, where):
                receiver = self._receive(serving_input_fn)
                folder = check_base(base) if is_chief else Path()
                module = self._build_module()
                scaffold = self._scaffold(module, receiver)
                step = 0
                if not is_untrained:
                    tensors, step = chosen.read(store, scaffold)
                    _load(module, tensors, scaffold, where)
                elif self.warm_start is not None and is_chief:
                    self.warm_start(module)
                if not is_chief:
                    return ""
                self.progress.message(f"exporting the weights of step {step} to {folder}")
                programs = self._trace(module, receiver, step, variants)
                return str(_write(folder, module, programs=programs, assets=assets, global_step=step,
                                  single_input=isinstance(receiver.received, Tensor), metrics=kept_metrics))

    def _variants(self) -> dict[frozenset[str], bool]:
        """Returns params['use_tpu'] of each program, by its tags."""
        variants = {tags: on_tpu for tags, on_tpu, wanted in (
            (CPU_TAGS, False, self.to_cpu), (TPU_TAGS, True, self.to_tpu)) if wanted}
        if not variants:
            raise ConfigError("One of export_to_cpu and export_to_tpu must be true.")
        return variants

    def _receive(self, serving_input_fn: Any) -> ServingInputReceiver:
        checked = check_serving_input_fn(serving_input_fn)
        with in_phase("serving_input_fn"):
            receiver = call_by_name(checked, {"params": copy.deepcopy(dict(self.source.params))})
        if not isinstance(receiver, ServingInputReceiver):
            raise ConfigTypeError("serving_input_fn must return a tpuspec.ServingInputReceiver; got "
                                  f"{type(receiver).__name__}.")
        return receiver

    def _build_module(self) -> nn.Module | None:
        """Builds a module of its own on the host: training goes on with the other one."""
        own = self.source.model
        module = copy.deepcopy(own).to(_HOST) if isinstance(own, nn.Module) else self.source.build_model()
        return None if module is None else cast_module(module, self.config.precision).eval()

    def _scaffold(self, module: nn.Module | None, receiver: ServingInputReceiver) -> Scaffold:
        """Runs model_fn once, on weights that do not matter; all that is wrong with the spec shows here."""
        with torch.no_grad():
            spec = self._served(module, receiver, step=0, on_tpu=not self.to_cpu).call_model_fn(
                {name: tensor.clone() for name, tensor in _weights_of(module).items()}, receiver.received)
        return spec.scaffold or Scaffold() if isinstance(spec, EstimatorSpec) else make_scaffold(spec.scaffold_fn)

    def _served(self, module: nn.Module | None, receiver: ServingInputReceiver, *, step: int,
                on_tpu: bool) -> _ServedModel:
        call = ModelFnCall(
            model_fn=self.model_fn, mode=ModeKeys.PREDICT, params={**self.source.params, "use_tpu": on_tpu},
            config=self.config, on_xla=False, batch_size=None, num_replicas=1)
        return _ServedModel(call, receiver, module, step)

    def _trace(self, module: nn.Module | None, receiver: ServingInputReceiver, step: int,
               variants: Mapping[frozenset[str], bool]) -> dict[frozenset[str], ServingProgram]:
        programs = {}
        for tags, on_tpu in variants.items():
            note_move()
            try:
                programs[tags] = trace(
                    self._served(module, receiver, step=step, on_tpu=on_tpu), _weights_of(module), receiver.received,
                    fixed_batch=receiver.fixed_batch)
            except Exception as error:
                if on_tpu:
                    error.add_note("That was the program for XLA devices, with params['use_tpu'] true; "
                                   "export_to_tpu=False leaves it out.")
                raise
        first, *others = programs.values()
        for other in others:
            if (other.inputs, other.signatures) != (first.inputs, first.signatures):
                raise ExportError("model_fn must give the same export_outputs with params['use_tpu'] true and false; "
                                  f"got {other.signatures} and {first.signatures}. Export one: export_to_cpu=False or "
                                  "export_to_tpu=False.")
        return programs


class _ServedModel:
    """model_fn in mode PREDICT as a pure function of weights and of what is received.

    Args:
      call: how model_fn is called.
      receiver: makes features of what is received.
      module: the module; its own tensors are neither used nor changed.
      step: the global step that model_fn sees.
    """

    def __init__(self, call: ModelFnCall, receiver: ServingInputReceiver, module: nn.Module | None, step: int) -> None:
        self._call, self._receiver, self._module, self._step = call, receiver, module, step

    def __call__(self, weights: Mapping[str, Tensor], received: Any) -> dict[str, ExportOutput]:
        """Returns the outputs by the name of their signature, in dtypes that numpy has."""
        spec = self.call_model_fn(weights, received)
        assert spec.export_outputs is not None, "the spec has a default in PREDICT"
        return {name: rebuild_output(output, [None if t is None else for_host(t) for t in flatten_output(output)])
                for name, output in spec.export_outputs.items()}

    def call_model_fn(self, weights: Mapping[str, Tensor], received: Any) -> Any:
        """Returns model_fn's spec."""
        outer = _Outer(self._module, self._call_with_module)
        return functional_call(outer, {f"module.{name}": tensor for name, tensor in weights.items()}, (received,),
                               strict=True)

    def _call_with_module(self, received: Any) -> Any:
        features = self._receiver.compute_features(received)
        batch = Batch(features=features).map(lambda tensor: cast_tensor(tensor, self._call.config.precision))
        return self._call(Replica(ordinal=0, device=_HOST, model=self._module,
                                  global_step=torch.tensor([self._step])), batch)


class _Outer(nn.Module):
    """Holds the module, so that its tensors can be replaced while a function runs that uses it somehow."""

    def __init__(self, module: nn.Module | None, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.module, self._function = module, function

    def forward(self, received: Any) -> Any:
        return self._function(received)


def _load(module: nn.Module | None, tensors: dict[str, Tensor], scaffold: Scaffold, where: str) -> None:
    if module is None:
        if tensors:
            raise UnfitCheckpointError(
                f"the checkpoint {where} holds a module's tensors, but the Trainer has no model.")
    elif scaffold.restore is not None:
        scaffold.restore(module, tensors)
    else:
        try:
            load_into_module(module, tensors)
        except CheckpointError as error:
            raise UnfitCheckpointError(f"Could not load all requested variables from checkpoint {where} for mode "
                                       f"{str(ModeKeys.PREDICT)!r}; nothing was exported. {error}") from error
    check_ready(module, scaffold)


def _write(base: Path, module: nn.Module | None, **contents: Any) -> Path:
    """Commits an export of a module; see `write_bundle` for its contents."""
    weights = storable_tensors(_weights_of(module), "model")
    note_move()
    try:
        return commit_next(base, lambda folder: write_bundle(
            writing_into(folder), weights=encode_tensors(weights), **contents))
    except OSError as error:
        raise ExportError(f"the export could not be written to {base}, where nothing of it is left: {error}. Its "
                          f"weights have {sum(tensor.nbytes for tensor in weights.values()):,} bytes.") from error


def _weights_of(module: nn.Module | None) -> dict[str, Tensor]:
    """Returns parameters and buffers by name, those too that no checkpoint holds; tied ones once."""
    if module is None:
        return {}
    return {name: tensor.detach() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


@contextmanager
def _noting_interruption(interruption: Interruption, where: str) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as error:
        if interruption.signal is not None:
            error.add_note(f"stopped before anything was exported. The weights are in {where}, for the next export().")
        raise
