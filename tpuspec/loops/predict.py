"""The prediction loop: a generator that keeps a few steps ahead of what it yields."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from tpuspec import summary
from tpuspec.data.host_values import HostValues
from tpuspec.data.pipeline import HostBatch
from tpuspec.drain.drain import Drain, DrainedStep
from tpuspec.drain.executor import HostExecutor
from tpuspec.errors import ConfigError, SpecError
from tpuspec.loops.agreement import InputEnd
from tpuspec.loops.draw import drawing
from tpuspec.loops.hooks import HookRunner
from tpuspec.loops.host_work import run_host_function
from tpuspec.precision import for_host
from tpuspec.spec.backend import Backend, CompiledStep
from tpuspec.spec.phase import mark_step
from tpuspec.summary.writer import SummaryWriter


@dataclass(slots=True, kw_only=True)
class PredictLoop:
    """Yields the predictions of each batch, in order, without padding.

    Steps are dispatched ahead of what the consumer reads. Hooks fire once per batch, when it is yielded. An error comes
    behind the batches before it.

    Attributes:
      backend: the device runtime.
      step: the compiled prediction step.
      batches: the input.
      executor: the worker; brings each step's outputs to the host, and runs host_call.
      copies: as in `Drain`.
      most_ahead: steps that may be under way while the consumer reads.
      hooks: of this call.
      writer: default writer of host_call.
      global_step: of the weights; the default step of summaries.
      input_end: of the input.
    """

    backend: Backend
    step: CompiledStep
    batches: Iterator[HostBatch]
    executor: HostExecutor
    copies: int
    most_ahead: int
    hooks: HookRunner
    writer: SummaryWriter
    global_step: int
    input_end: InputEnd = field(default_factory=InputEnd)
    _arrived: deque[DrainedStep] = field(default_factory=deque, init=False)
    _kept: dict[int, HostValues] = field(default_factory=dict, init=False)

    def run(self) -> Generator[DrainedStep, None, None]:
        """Predicts; yields each step's outputs on the host."""
        drain = Drain(self.backend.fetch, self.executor, work=self._work, copies=self.copies)
        failure: Exception | None = None
        with self.hooks:
            for number in itertools.count(1):
                try:
                    with drawing(self.input_end):
                        batch = next(self.batches, None)
                    if batch is not None:
                        if any(batch.kept.values()):
                            self._kept[number] = batch.kept
                        drain.submit(number, self.step(self.backend.feed(batch.replicas)), batch.rows)
                except Exception as error:
                    mark_step(error, number)
                    failure, batch = error, None
                yield from self._yield_arrived(left=0 if batch is None else self.most_ahead)
                if batch is None or self.hooks.context.stop_requested:
                    break
            if failure is not None:
                raise failure
            if not self.hooks.context.stop_requested:
                self.executor.check()

    def take_kept(self, step: DrainedStep) -> HostValues:
        """Returns the strings of the features of a step that was yielded."""
        return self._kept.pop(step.step, {})

    def _yield_arrived(self, *, left: int) -> Generator[DrainedStep, None, None]:
        """Yields what is there, and waits for more until at most `left` steps are under way."""
        while self._arrived or self.executor.num_under_way > left:
            if not self._arrived:
                self.executor.wait(left=self.executor.num_under_way - 1)
                continue
            if self.hooks.context.stop_requested:
                return
            step = self._arrived.popleft()
            self.hooks.before_run(step.step - 1)
            self.hooks.after_run(step.step, step.functions.hooks)
            yield step

    def _work(self, step: DrainedStep) -> None:
        host_call = step.functions.host_call
        if host_call is not None:
            with summary.as_default(self.writer, self.global_step):
                run_host_function("host_call", host_call, step.join("host_call"), step=step.step)
        self._arrived.append(step)


def select_predictions(predictions: Any, predict_keys: Sequence[str] | None, kept: HostValues | None = None) -> Any:
    """Returns the named predictions as arrays, or all of them.

    Args:
      predictions: host tensors, a dict or one.
      predict_keys: names to return; None returns all.
      kept: columns of strings that join a dict of predictions, unless it has their names.

    Raises:
      ConfigError: names are given but the predictions are a single tensor, or no name is among them.
    """
    if not isinstance(predictions, Mapping):
        if predict_keys is not None:
            raise ConfigError("predict_keys argument is not valid in case of non-dict predictions.")
        return to_numpy(predictions[0] if isinstance(predictions, list) else predictions)
    columns = {key: np.array(values, dtype=object) for key, values in (kept or {}).items() if key not in predictions}
    if predict_keys is None:
        return {key: to_numpy(tensor) for key, tensor in predictions.items()} | columns
    chosen = {key: to_numpy(tensor) for key, tensor in predictions.items() if key in predict_keys}
    chosen |= {key: values for key, values in columns.items() if key in predict_keys}
    if not chosen:
        raise ConfigError(f"Expected to run at least one output from {sorted([*predictions, *columns])}; got "
                          f"predict_keys={list(predict_keys)}.")
    return chosen


def single_examples(predictions: Any) -> Iterator[Any]:
    """Yields row after row of a batch's predictions.

    Raises:
      SpecError: the predictions have different numbers of rows.
    """
    if not isinstance(predictions, Mapping):
        yield from predictions
        return
    sizes = {key: len(array) for key, array in predictions.items()}
    if len(set(sizes.values())) > 1:
        raise SpecError(f"Batch length of predictions should be same; got {sizes}.")
    for i in range(next(iter(sizes.values()), 0)):
        yield {key: array[i] for key, array in predictions.items()}


def to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Returns the values as an array; bfloat16, which numpy does not have, as float32."""
    return for_host(tensor.detach()).numpy()
