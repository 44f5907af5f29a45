"""The input of one host: input_fn called by plan, its batches checked, padded and dealt out to the replicas."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Dataset

from tpuspec.config import RunConfig
from tpuspec.data.batch_axis import BatchAxis, rows_to_axes
from tpuspec.data.context import InputContext, TPUContext
from tpuspec.data.deployment import InputCall, InputPlan
from tpuspec.data.host_values import HostValues, check_host_values, take_host_values
from tpuspec.data.index_limits import IndexLimits
from tpuspec.data.known_form import KnownForm
from tpuspec.data.length import length_of
from tpuspec.data.padding import pad_batch, padding_like, row_mask, split_rows
from tpuspec.data.position import Position, common_start
from tpuspec.data.share import Share, is_map_style
from tpuspec.data.source import raw_batches
from tpuspec.data.structure import BatchChecker, count_rows, to_host_batch
from tpuspec.errors import InputError
from tpuspec.precision import cast_tensor
from tpuspec.spec.backend import Topology
from tpuspec.spec.functions import call_by_name, check_input_fn
from tpuspec.spec.mode import ModeKeys
from tpuspec.spec.results import Batch, StepRows


@dataclass(frozen=True, slots=True, kw_only=True)
class HostBatch:
    """One step's input on this host.

    Attributes:
      replicas: one batch a local replica, all of one shape where shapes are static.
      rows: which rows are real, in replica order.
      position: where each call of input_fn stands behind this batch, for a checkpoint.
      kept: strings of the features, in the order of the real rows; without values where that is not prediction.
    """

    replicas: list[Batch]
    rows: StepRows
    position: list[Position] = field(default_factory=list)
    kept: HostValues = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSettings:
    """What the input of one call of train, evaluate or predict depends on.

    Attributes:
      input_fn: the user's.
      mode: the mode.
      params: the Trainer's, without reserved keys.
      config: the run's settings.
      plan: the deployment.
      topology: who computes.
      static_shapes: whether short batches are padded.
      with_context: whether params carry a 'context'.
      seed: of the shuffle.
      starts: where each call of input_fn stood in an earlier training; None at the first.
      strict_start: whether a start that cannot be gone back to is an error; else the input begins anew.
      batch_axis: where the rows of each tensor are.
      limits: of labels and ids, once the first batch was observed.
    """

    input_fn: Callable[..., Any]
    mode: ModeKeys
    params: Mapping[str, Any]
    config: RunConfig
    plan: InputPlan
    topology: Topology
    static_shapes: bool
    with_context: bool = True
    seed: int = 0
    starts: list[Position] | None = None
    strict_start: bool = True
    batch_axis: BatchAxis = field(default_factory=BatchAxis)
    limits: IndexLimits = field(default_factory=IndexLimits)


class InputPipeline:
    """An iterator over HostBatches; input_fn is called when it is made.

    Raises:
      ConfigError: input_fn's arguments are wrong.
      InputError, InputTypeError: input_fn returned or yields something that breaks a rule, or nothing at all. An
        exception of the user's own passes through unchanged.
    """

    def __init__(self, settings: InputSettings, *, sleep: Callable[[float], None] = time.sleep) -> None:
        check_input_fn(settings.input_fn)
        self._settings = settings
        calls = settings.plan.on_host(settings.topology.host_index)
        params = copy.deepcopy(dict(settings.params))  # one copy of the values for all calls, as in TPUEstimator
        # A checkpoint holds the positions of all hosts' calls; a training that goes on in memory those of its own.
        is_own = settings.starts is not None and len(settings.starts) == len(calls)
        self._feeds: list[_Feed] = []
        try:
            for i, call in enumerate(calls):
                place = (i, len(calls)) if is_own else (call.index, call.num_calls)
                self._feeds.append(_Feed(settings, call, dict(params), common_start(settings.starts, *place)))
        except BaseException:
            self.close()
            raise
        self._sleep_seconds = settings.config.tpu_config.initial_infeed_sleep_secs
        self._sleep = sleep
        self._rows: StepRows | None = None
        self._started = False

    def __iter__(self) -> Iterator[HostBatch]:
        return self

    def __next__(self) -> HostBatch:
        if not self._started and self._sleep_seconds and self._settings.with_context:
            self._sleep(self._sleep_seconds)
        parts = [feed.draw() for feed in self._feeds]
        # A training step runs on real rows or not at all; evaluation goes on until the last feed ends.
        ends = any if self._settings.mode is ModeKeys.TRAIN else all
        if ends(part is None for part in parts):
            if not self._started:
                raise InputError(
                    "input_fn yielded no batches. The dataset is empty, or was read to its end before."
                    if all(part is None for part in parts) else
                    "input_fn yielded less than one step: training needs a full batch for every replica.")
            raise StopIteration
        self._started = True
        batches, masks = [], []
        for feed, part in zip(self._feeds, parts, strict=True):
            replicas, mask = part if part is not None else feed.padding()
            batches += replicas
            masks.append(mask)
        self._settings.limits.check(batches)
        mask = masks[0] if len(masks) == 1 else torch.cat(masks)
        # Only training goes on from a position.
        position = [feed.position() for feed in self._feeds] if self._settings.mode is ModeKeys.TRAIN else []
        if self._rows is None or mask is not self._rows.mask:  # full batches share one
            self._rows = StepRows(mask=mask, num_rows=int(mask.sum()))
        return HostBatch(replicas=batches, rows=self._rows, position=position, kept=self._take_kept())

    def _take_kept(self) -> HostValues:
        taken = [feed.take_kept() for feed in self._feeds]
        if not any(taken):
            return {}
        return {name: [value for kept in taken for value in kept.get(name, ())] for name in (taken[0] if taken else ())}

    def end_of(self) -> tuple[int | None, int | None]:
        """Returns after how many steps this host's input ends, and the step that would draw a short batch.

        From its start, each None where that is not known, or does not happen.
        """
        lengths = [(feed.length, feed.call) for feed in self._feeds if feed.length is not None]
        ends = [length.num_batches // call.batches_per_step for length, call in lengths]
        short = [step for length, call in lengths if self._settings.static_shapes and self._settings.batch_axis.is_first
                 and (step := length.short_step(call.batch_size, call.batches_per_step)) is not None]
        return min(ends, default=None), min(short, default=None)

    def close(self) -> None:
        """Lets go of the input, also before its end: workers of a DataLoader end."""
        for feed in self._feeds:
            feed.close()

    def padding(self) -> HostBatch:
        """Returns a step's batches without a real row, for a host whose input ended before that of others."""
        parts = [feed.padding() for feed in self._feeds]
        mask = torch.cat([mask for _, mask in parts])
        return HostBatch(replicas=[batch for batches, _ in parts for batch in batches],
                         rows=StepRows(mask=mask, num_rows=0))


class _Feed:
    """The batches of one call of input_fn, dealt out to the replicas it feeds."""

    def __init__(self, settings: InputSettings, call: InputCall, params: dict[str, Any],
                 start: Position | None) -> None:
        self.call = call
        self._precision = settings.config.precision
        self._static = settings.static_shapes
        self._broadcast = settings.plan.broadcast
        self._is_training = settings.mode is ModeKeys.TRAIN
        self._predicts = settings.mode is ModeKeys.PREDICT
        topology = settings.topology
        if call.batch_size is not None:
            params["batch_size"] = call.batch_size
        context = TPUContext(num_hosts=topology.num_hosts, num_replicas=topology.num_replicas, call=call,
                             num_cores_per_replica=settings.config.tpu_config.num_cores_per_replica)
        if settings.with_context:
            params["context"] = context
        source = call_by_name(settings.input_fn, {
            "params": params, "mode": settings.mode, "config": copy.deepcopy(settings.config),
            "input_context": InputContext(num_input_pipelines=call.num_calls, input_pipeline_id=call.index,
                                          num_replicas_in_sync=topology.num_replicas)})
        # An input_fn that asks which call it is deals out the rows itself.
        deals = context.was_asked or "input_context" in inspect.signature(settings.input_fn).parameters
        share = None if deals or call.num_calls == 1 else Share(
            index=call.index, num_calls=call.num_calls, batches_per_step=call.batches_per_step)
        self._iterator = raw_batches(
            source, input_fn=settings.input_fn, mode=settings.mode,
            batch_size=call.batch_size, seed=settings.seed,
            start=start, strict=settings.strict_start, share=share)
        self.length = length_of(source, self._iterator.position()) if self._is_training else None
        self._checker = None
        if settings.static_shapes:
            assert call.batch_size is not None, "plan_input gives every call a batch size"
            self._checker = BatchChecker(
                batch_size=call.batch_size, exact=settings.mode is ModeKeys.TRAIN,
                may_be_empty=share is not None and is_map_style(source))
            self._full_mask = row_mask(call.batch_size, call.batch_size)
        self._known = KnownForm()
        self._batch_axis, self._axes = settings.batch_axis, {}
        # A Dataset's rows are collated along axis 0; other inputs yield batches as they are to be.
        self._is_collated = isinstance(source, Dataset)
        self._last: Batch | None = None
        # Columns of strings: their names in the first batch, and the values since they were last taken.
        self._columns: tuple[str, ...] = ()
        self._kept: HostValues = {}

    def take_kept(self) -> HostValues:
        """Returns the strings of the features that were drawn since the last call, by column."""
        kept = self._kept
        if kept or self._columns:
            self._kept = {name: [] for name in self._columns}
        return kept

    def position(self) -> Position:
        """Returns where the input stands."""
        return self._iterator.position()

    def close(self) -> None:
        """Lets go of the input."""
        self._iterator.close()

    def draw(self) -> tuple[list[Batch], torch.Tensor] | None:
        """Returns one step's batches, one a replica, with the mask of their rows; None at the end of the input."""
        call = self.call
        if call.batches_per_step == call.num_replicas == 1:
            one = self._draw_one()
            return None if one is None else ([one[0]], one[1])
        drawn = [self._draw_one()]
        while drawn[-1] is not None and len(drawn) < call.batches_per_step:
            drawn.append(self._draw_one())
        parts = [part for part in drawn if part is not None]
        if not parts or (self._is_training and len(parts) < call.batches_per_step):
            return None
        while len(parts) < call.batches_per_step:  # the input ended within a step
            parts.append(self._padding())
        batches, masks = [batch for batch, _ in parts], [mask for _, mask in parts]
        if self._broadcast:
            return batches * call.num_replicas, masks[0]
        if call.splits:
            batches = split_rows(batches[0], call.num_replicas, self._axes)
        return batches, masks[0] if len(masks) == 1 else torch.cat(masks)

    def padding(self) -> tuple[list[Batch], torch.Tensor]:
        """Returns a step's batches without a real row, for a feed that ended before the others."""
        if self._last is None:
            raise InputError("input_fn yielded no batches on one of several calls; every call must yield one.")
        parts = [self._padding() for _ in range(self.call.batches_per_step)]
        batches = [batch for batch, _ in parts]
        if self.call.splits:
            batches = split_rows(batches[0], self.call.num_replicas, self._axes)
        return batches, torch.cat([mask for _, mask in parts])

    def _padding(self) -> tuple[Batch, torch.Tensor]:
        assert self._last is not None and self.call.batch_size is not None
        return padding_like(self._last, self.call.batch_size, self._axes), row_mask(0, self.call.batch_size)

    def _draw_one(self) -> tuple[Batch, torch.Tensor] | None:
        try:
            element = next(self._iterator)
        except StopIteration:
            return None
        known = self._known.batch(element)
        kept: HostValues = {}
        if known is None:
            element, kept = take_host_values(element)
            batch = self._with_axes(to_host_batch(element))
        else:
            batch = known
        if self._predicts:
            batch = Batch(features=batch.features)
        if known is not None:
            check_host_values({}, self._columns, 0)
            self._last = batch
            return batch, self._full_mask
        num_real = count_rows(batch, self._axes) if self._checker is None else self._checker.check(batch, self._axes)
        if self._last is None:
            self._columns = tuple(kept)
        check_host_values(kept, self._columns, num_real)
        for name, values in kept.items():
            self._kept.setdefault(name, []).extend(values if self._predicts else ())
        if self._precision is not None:
            batch = batch.map(lambda tensor: cast_tensor(tensor, self._precision))
        self._last = batch
        if self._checker is None:
            return batch, row_mask(num_real, num_real)
        assert self.call.batch_size is not None
        if num_real < self.call.batch_size:
            self._known.forget()
            return pad_batch(batch, self.call.batch_size, self._axes), row_mask(num_real, self.call.batch_size)
        if not kept:
            self._known.learn(element, batch)
        return batch, self._full_mask

    def _with_axes(self, batch: Batch) -> Batch:
        """Notes where the rows of each tensor are, and brings them there if they were collated here."""
        if self._batch_axis.is_first:
            return batch
        if self._checker is None or self._last is None:  # later ones must be like the first
            self._axes = self._batch_axis.axes(batch)
        return rows_to_axes(batch, self._axes) if self._is_collated else batch
