"""A model on its devices: replicas built once, their state read and written at loop boundaries."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tpuspec.checkpoint.restore import check_fits, load_into_module
from tpuspec.checkpoint.state import TrainingState
from tpuspec.checkpoint.stored import read_all
from tpuspec.data.random_state import ProcessRandomState
from tpuspec.errors import CheckpointError, ConfigError
from tpuspec.loops.learning_rates import LearningRateSchedules
from tpuspec.loops.model_source import ModelSource
from tpuspec.loops.optimizer_state import (
    add_groups,
    check_optimizer_state,
    hyper_parameters,
    load_optimizer,
    read_optimizer,
)
from tpuspec.loops.run_position import collect_positions
from tpuspec.loops.shared_memory import check_memory
from tpuspec.loops.split_state import StoredOptimizer, load_stored_model
from tpuspec.precision import Precision, cast_module
from tpuspec.spec.backend import Backend, CompiledStep, Replica, StepFunction
from tpuspec.spec.mode import ModeKeys
from tpuspec.spec.scaffold import Scaffold

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Session:
    """One backend with the replicas of a model; lives as long as its Trainer.

    Attributes:
      backend: the device runtime.
      replicas: the local replicas, equal in state.
      global_step: completed updates, as the host counts them.
      input_position: where the training input stands behind the last update; None before any.
      random_state: after the last training, for the next; None where it is to be seeded.
      has_state: whether the state was trained or restored; before, it is the initial one.
      metrics: results of the newest evaluation; None before one.
      tried_metrics: metric functions that the rehearsal has tried on zeros, with their shapes.
    """

    def __init__(self, backend: Backend, source: ModelSource, *, seed: int, precision: Precision | None = None) -> None:
        self.backend = backend
        self.global_step = 0
        self.has_state = False
        self.metrics: Mapping[str, Any] | None = None
        self.tried_metrics: set[Hashable] = set()
        self.input_position: list[dict[str, Any]] | None = None
        self.random_state: dict[str, Any] | None = None
        self._source = source
        self._compiled: dict[ModeKeys, CompiledStep] = {}
        self._num_lent = 0
        self._asked: dict[str, list[dict[str, Any]]] = {}
        self._schedules: LearningRateSchedules | None = None
        backend.seed(seed)
        module = source.build_model()
        if source.warm_start is not None:
            source.warm_start(module)
        if module is not None and (backend.static_shapes or precision is not None):
            check_memory(module)
        self._frozen = _frozen_modules(module)
        self.replicas: list[Replica] = backend.place(None if module is None else cast_module(module, precision))

    @property
    def module(self) -> nn.Module | None:
        """The first replica's module."""
        return self.replicas[0].model

    @property
    def num_parameters(self) -> int:
        """Numbers in the module's parameters."""
        return 0 if self.module is None else sum(p.numel() for p in self.module.parameters())

    def ensure_optimizers(self) -> None:
        """Builds the optimizers and their schedules on first use: an evaluation needs none.

        The first replica's optimizers have the schedules; the others follow.
        """
        for replica in self.replicas:
            if not replica.optimizers:
                replica.optimizers = self._source.build_optimizers(replica.model)
                self._asked = {name: hyper_parameters(optimizer) for name, optimizer in replica.optimizers.items()}
        if self._schedules is None and self._source.scheduler is not None:
            self._schedules = LearningRateSchedules(
                self._source.scheduler, self.replicas[0].optimizers, self._source.params, self._read_evaluations)

    def count_update(self) -> None:
        """Counts an update that was dispatched; the learning rates become those of the next one."""
        self.global_step += 1
        if self._schedules is not None:
            self._schedules.step()

    def _read_evaluations(self, name: str | None) -> dict[int, dict[str, float]]:
        coordinator = self.backend.coordinator
        own = self._source.read_evaluations(name) if coordinator.is_chief else {}
        shared = coordinator.share([[step, dict(metrics)] for step, metrics in own.items()])
        return {step: metrics for step, metrics in shared}

    @property
    def optimizer(self) -> Any:
        """What the user's optimizer function returned, of the first replica: an optimizer, or a dict of several."""
        optimizers = self.replicas[0].optimizers
        return optimizers.get("", optimizers) or None

    def evaluated(self, name: str | None, metrics: Mapping[str, Any]) -> None:
        """Lets schedules that follow a metric do so.

        Args:
          name: of the evaluation.
          metrics: its results, with the 'global_step' that was evaluated.

        Raises:
          ConfigError: it lacks the metric.
        """
        self.metrics = metrics
        if self._schedules is not None:
            self._schedules.evaluated(int(metrics["global_step"]), name, metrics)

    def take_back_updates(self, step: int) -> None:
        """Counts again from a step on, as before updates that were not dispatched after all."""
        self.global_step = step
        if self._schedules is not None:
            self._schedules.move_to(step)

    def compiled_step(self, mode: ModeKeys, step: StepFunction, *, num_at_once: int = 1) -> CompiledStep:
        """Returns the step of a mode, made ready on first use: one Trainer has one step a mode."""
        if mode not in self._compiled:
            self._compiled[mode] = self.backend.compile_step(step, self.replicas, num_at_once=num_at_once)
        return self._compiled[mode]

    def drop_gradients(self) -> None:
        """Drops what an update that did not complete has accumulated."""
        for replica in self.replicas:
            if replica.model is not None:
                replica.model.zero_grad(set_to_none=True)
            for optimizer in replica.optimizers.values():
                optimizer.zero_grad(set_to_none=True)

    def settle(self) -> None:
        """After a step that failed: no gradients are left, and the devices count the steps that the host counts."""
        self.drop_gradients()
        self.set_global_step(self.global_step)

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Notes that a predict() generator holds the model in eval() mode, perhaps with other weights."""
        self._num_lent += 1
        try:
            yield
        finally:
            self._num_lent -= 1

    def check_not_lent(self, verb: str) -> None:
        """Checks that no predict() generator is open.

        Raises:
          ConfigError: one is.
        """
        if self._num_lent:
            raise ConfigError(f"{verb} cannot go on while a predict() generator is open, which holds the model with "
                              "its own weights and mode. Read the generator to its end, or close() it.")

    def set_training(self, training: bool) -> None:
        """Puts the modules into train() or eval() mode; parts that the model function put into eval() stay there."""
        for replica in self.replicas:
            if replica.model is not None:
                replica.model.train(training)
                for name, part in replica.model.named_modules():
                    if name in self._frozen:
                        part.training = False

    @contextlib.contextmanager
    def evaluating(self, seed: int) -> Iterator[None]:
        """Puts the modules into eval() mode; mode and random state are as before afterwards, so training goes on."""
        random_state = self.backend.rng_state()
        modes = [(part, part.training) for replica in self.replicas if replica.model is not None
                 for part in replica.model.modules()]
        self.set_training(False)
        self.backend.seed(seed)
        try:
            yield
        finally:
            try:
                for step in self._compiled.values():
                    step.publish()  # also where the loop was left early: the next one starts from the modules again
            finally:
                for part, training in modes:
                    part.training = training
                self.backend.set_rng_state(random_state)

    @contextlib.contextmanager
    def with_buffers_of_chief(self) -> Iterator[None]:
        """Lends all replicas the buffers that checkpoints have, such as BatchNorm's running statistics.

        Gradients keep parameters equal; buffers follow each replica's own rows. Those of a program's replicas are
        averaged, and of several processes the chief's are taken.
        """
        with self.backend.keeping_statistics(whole=True), self.keeping_buffers() as own:
            if own:
                first = self.backend.coordinator.share(own[0])
                for replica, buffers in zip(self.replicas, own, strict=True):
                    if self.backend.coordinator.num_hosts > 1 or buffers is not own[0]:
                        _copy_into(_buffers_of(replica), first)
            yield

    @contextlib.contextmanager
    def keeping_buffers(self) -> Iterator[list[list[Tensor]]]:
        """Gives each replica its own buffers back at the end of the block.

        Yields:
          For each local replica its buffers on the host; nothing where one replica is all, or has none.
        """
        buffers = [_buffers_of(replica) for replica in self.replicas]
        if len(self.replicas) == self.backend.coordinator.num_hosts == 1 or not buffers[0]:
            with self.backend.keeping_statistics(whole=False):
                yield []
            return
        own = _own(self.backend.fetch(buffers), buffers)
        try:
            yield own
        finally:
            for tensors, values in zip(buffers, own, strict=True):
                _copy_into(tensors, values)

    def model_state(self, scaffold: Scaffold | None = None, *, in_pieces: bool = False) -> dict[str, Any]:
        """Reads the module's state dict to the host, or what the scaffold's saver gives instead."""
        if self.module is None:
            return {}
        read = scaffold.saver if scaffold is not None and scaffold.saver is not None else nn.Module.state_dict
        state = dict(read(self.module))
        return _own(self._fetch(state, in_pieces), state)

    def _fetch(self, tree: T, in_pieces: bool) -> T:
        split = self.backend.split_state if in_pieces else None
        return self.backend.fetch(tree) if split is None else split.fetch_pieces(tree)

    def training_state(self, scaffold: Scaffold, of_input: ProcessRandomState | None = None, *,
                       in_pieces: bool = False) -> TrainingState:
        """Reads everything that a later run goes on from; see read_random_state.

        Args:
          scaffold: may read the module itself.
          of_input: random state of the process, as in read_random_state.
          in_pieces: whether tensors that are split over hosts come as `Pieces`.
        """
        optimizers = {name: read_optimizer(optimizer, self._asked[name], self.module)
                      for name, optimizer in self.replicas[0].optimizers.items()}
        extra = collect_positions(self.backend, self.input_position, of_input)
        if statistics := self.backend.statistics():
            extra["statistics"] = statistics
        return TrainingState(global_step=self.global_step, model=self.model_state(scaffold, in_pieces=in_pieces),
                             optimizers=_own(self._fetch(optimizers, in_pieces), optimizers), extra=extra)

    def load_model(self, tensors: Mapping[str, Any], scaffold: Scaffold | None = None) -> None:
        """Loads a module's state dict on every replica.

        Raises:
          CheckpointError: names or shapes differ.
        """
        if (scaffold is None or scaffold.restore is None) and self.module is not None:
            check_fits(self.module, tensors)
            if load_stored_model(self.backend, self.replicas[0], tensors):
                return
        whole: dict[str, Tensor] = read_all(dict(tensors))
        for replica in self.replicas:
            if scaffold is not None and scaffold.restore is not None and replica.model is not None:
                scaffold.restore(replica.model, whole)
            elif replica.model is not None:
                load_into_module(replica.model, whole)
            elif whole:
                raise CheckpointError("Restoring from checkpoint failed: it holds a module's tensors, but the Trainer "
                                      "has no model.")

    def load_training_state(self, state: TrainingState, scaffold: Scaffold) -> None:
        """Loads module, optimizers and global step.

        Raises:
          CheckpointError: they do not fit; nothing was loaded then.
        """
        with state.source:
            self._load_training_state(state, scaffold)

    def _load_training_state(self, state: TrainingState, scaffold: Scaffold) -> None:
        if self.module is not None and scaffold.restore is None:
            check_fits(self.module, state.model)
            _tell_of_dtypes(self.module, state.model)
        names = set(self.replicas[0].optimizers)
        if names != set(state.optimizers):
            raise CheckpointError(f"Restoring from checkpoint failed: it holds the optimizers "
                                  f"{sorted(state.optimizers)}, the Trainer has {sorted(names)}, a mismatch.")
        for replica in self.replicas:
            for name, optimizer in replica.optimizers.items():
                add_groups(optimizer, replica.model, state.optimizers[name])
        for name, optimizer in self.replicas[0].optimizers.items():
            check_optimizer_state(name, optimizer, state.optimizers[name])
        self.load_model(state.model, scaffold)
        self.backend.set_statistics(self.replicas[0], state.extra.get("statistics", {}))
        if self._schedules is not None:
            # Before the optimizers: their rates are then those that the checkpoint has.
            self._schedules.move_to(state.global_step)
        for replica in self.replicas:
            for name, optimizer in replica.optimizers.items():
                stored = StoredOptimizer(self.backend, optimizer, state.optimizers[name])
                load_optimizer(name, optimizer, stored.saved, asked=self._asked[name],
                               is_scheduled=self._schedules is not None, tell=replica is self.replicas[0])
                stored.fill(replica)
        self.set_global_step(state.global_step)
        self.input_position, self.random_state = state.extra.get("input"), state.extra.get("random")

    def set_global_step(self, step: int) -> None:
        """Sets the step on host and devices."""
        self.global_step = step
        for replica in self.replicas:
            with torch.no_grad():
                replica.global_step.copy_(torch.tensor([step]))


def _frozen_modules(module: nn.Module | None) -> frozenset[str]:
    """Names the parts that are in eval() mode within a module in train() mode, as BatchNorms that are not to move.

    A module that is wholly in eval() mode, as from_pretrained returns it, has none.
    """
    if module is None or not module.training:
        return frozenset()
    return frozenset(name for name, part in module.named_modules() if not part.training)


def _tell_of_dtypes(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Warns where a checkpoint was written in another precision: the run goes on, but not with the same bits."""
    own = module.state_dict()
    cast = sorted({(str(tensor.dtype), str(own[name].dtype)) for name, tensor in tensors.items()
                   if isinstance(own[name], Tensor) and own[name].dtype != tensor.dtype})
    if cast:
        logger.warning("the checkpoint was written in another precision: its weights are cast, %s. The optimizer's "
                       "state goes with them.", ", ".join(f"{old} -> {new}" for old, new in cast))


def _buffers_of(replica: Replica) -> list[Tensor]:
    return [] if replica.model is None else list(replica.model.buffers())


def _own(fetched: Any, read: Any) -> Any:
    """Copies the tensors that were on the host already, so that later steps cannot change them."""
    return pytree.tree_map(
        lambda leaf, own: leaf.detach().clone() if isinstance(leaf, Tensor) and leaf is own else leaf, fetched, read)


def _copy_into(tensors: list[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
