"""A plan of one mode: its step is traced as in a run, until it would be replayed, and its program compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tpuspec.data.batch_axis import BatchAxis
from tpuspec.data.structure import map_named
from tpuspec.errors import CaptureError, ConfigError
from tpuspec.loops.prepare import Preparation
from tpuspec.loops.session import Session
from tpuspec.plan.chips import chip_of
from tpuspec.plan.plan import ModePlan
from tpuspec.plan.search import search_largest
from tpuspec.spec.backend import CompiledStep, RunsSeveral
from tpuspec.spec.engine import CompiledFacts
from tpuspec.spec.mode import ModeKeys
from tpuspec.spec.results import Batch

_MOST_STEPS = 40
"""Two equal traces are needed, and optimizers make their state in the first; the checks that follow come at longer and
longer distances, into which several steps at once must fit."""


class Chips(Protocol):
    """A topology of chips that are not there.

    Attributes:
      num_chips: of it.
    """

    num_chips: int

    def num_devices(self) -> int:
        """Counts the devices: a chip of some generations is two."""
        ...

    def compile_newest(self) -> CompiledFacts:
        """Compiles the program that was replayed last."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Planning:
    """Plans the modes of a run, one after the other.

    Attributes:
      session: over a backend that compiles for the topology.
      chips: the topology.
      topology: its name.
      num_at_once: training steps of one program.
      seed: of evaluations.
      batch_axis: where the rows of each tensor are.
    """

    session: Session
    chips: Chips
    topology: str
    num_at_once: int
    seed: int
    batch_axis: BatchAxis

    def run(self, mode: ModeKeys, prepare: Callable[[int | None], Preparation], input_fn: Callable[..., Any],
            num_rows: int | None, *, largest: bool = False) -> ModePlan:
        """Plans a mode.

        Args:
          mode: train, eval or predict.
          prepare: returns the preparation of a global batch of so many rows.
          input_fn: makes the input; one batch is drawn.
          num_rows: of the global batch; None is an error that `prepare` raises.
          largest: whether to look for the largest global batch that fits, and plan that.

        Raises:
          ConfigError: the step cannot be captured, or `largest` is asked for and the rows of the batch are not free.
        """
        is_training = mode is ModeKeys.TRAIN
        with contextlib.ExitStack() as stack:
            if is_training:
                self.session.ensure_optimizers()
                self.session.set_training(True)
            else:
                stack.enter_context(self.session.evaluating(self.seed))
            try:
                prepared = prepare(num_rows).run(input_fn)
                stack.enter_context(contextlib.closing(prepared.batches))
                batches = next(iter(prepared.batches)).replicas
                assert num_rows is not None, "as `prepare` has checked"
                plan = self._plan(mode, prepared.step, batches, num_rows)
            except CaptureError as error:
                raise ConfigError(f"mode=plan needs a step that can be captured: {error}") from error
            if not largest:
                return plan
            return search_largest(plan, self.session.backend.topology.num_replicas, lambda rows: self._plan_of(
                mode, prepare, batches, rows, num_rows))

    def _plan_of(self, mode: ModeKeys, prepare: Callable[[int | None], Preparation], batches: Sequence[Batch],
                 num_rows: int, given_rows: int) -> ModePlan:
        """Plans a mode with another number of rows than the batches have.

        Raises:
          ConfigError: the step cannot be traced with them.
        """
        preparation = prepare(num_rows)
        step = self.session.backend.compile_step(
            preparation.make_step(), self.session.replicas,
            num_at_once=self.num_at_once if mode is ModeKeys.TRAIN else 1)
        resized = [self._with_rows(batch, preparation.plan.replica_batch_size or 0) for batch in batches]
        try:
            return self._plan(mode, step, resized, num_rows)
        except Exception as error:
            raise ConfigError(
                f"plan.batch=largest needs a step that takes any number of rows. With {num_rows} in place of "
                f"{given_rows}, it raises {type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error
        finally:
            step.publish()

    def _with_rows(self, batch: Batch, num_rows: int) -> Batch:
        """Returns a batch of so many rows, without values."""
        axes = self.batch_axis.axes(batch)

        def resize(name: str, tensor: torch.Tensor) -> torch.Tensor:
            shape = list(tensor.shape)
            if shape:
                shape[axes.get(name, 0)] = num_rows
            return torch.empty(shape, dtype=tensor.dtype, device="meta")

        return map_named(batch, resize)

    def _plan(self, mode: ModeKeys, step: CompiledStep, batches: Sequence[Batch], num_rows: int) -> ModePlan:
        num_steps = self._replay(step, batches, self.num_at_once if mode is ModeKeys.TRAIN else 1)
        backend: Any = self.session.backend
        return ModePlan.of(
            "predict" if mode is ModeKeys.PREDICT else mode.value, self.chips.compile_newest(),
            backend.inputs_of_newest(), chip_of(self.topology), self.chips.num_devices() // self.chips.num_chips,
            num_rows, num_steps)

    def _replay(self, step: CompiledStep, batches: Sequence[Batch], num_at_once: int) -> int:
        """Takes steps on a batch until one is a replay; returns the number of steps of its program.

        Raises:
          CaptureError, ConfigError: the step cannot be captured.
        """
        backend = self.session.backend
        for _ in range(_MOST_STEPS):
            is_update, micro_step = False, 0
            while not is_update:
                is_update = step(backend.feed(batches), micro_step)[0].is_update
                micro_step += 1
            if backend.step_kind == "replay" and (
                    num_at_once == 1 or not isinstance(step, RunsSeveral) or step.num_at_once > 1):
                break
        if backend.step_kind != "replay":
            raise ConfigError("mode=plan needs a step that is captured, and this one is another one each time.")
        if isinstance(step, RunsSeveral) and step.num_at_once > 1:
            several = step.feed_several([batches] * step.num_at_once)
            if step.run_several(several, lambda: None) is not None:
                return len(several)
        return 1
