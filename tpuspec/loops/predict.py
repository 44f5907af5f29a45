"""The prediction loop: a generator that keeps one step ahead of what it yields."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tpuspec import summary
from tpuspec.data.pipeline import HostBatch
from tpuspec.errors import ConfigError, SpecError
from tpuspec.host.drain import Drain, DrainedStep
from tpuspec.host.executor import HostExecutor
from tpuspec.loops.hooks import HookRunner
from tpuspec.loops.host_work import run_host_function
from tpuspec.spec.backend import Backend, CompiledStep
from tpuspec.summary.writer import SummaryWriter


@dataclass(slots=True, kw_only=True)
class PredictLoop:
    """Yields the predictions of each batch, in order, without padding; hooks fire once per batch.

    Attributes:
      backend: the device runtime.
      step: the compiled prediction step.
      batches: the input.
      drain: brings each step's outputs to the host.
      executor: runs host_call.
      hooks: of this call.
      writer: default writer of host_call.
      global_step: of the weights; the default step of summaries.
    """

    backend: Backend
    step: CompiledStep
    batches: Iterator[HostBatch]
    drain: Drain
    executor: HostExecutor
    hooks: HookRunner
    writer: SummaryWriter
    global_step: int

    def run(self) -> Generator[DrainedStep, None, None]:
        """Predicts; yields each step's outputs on the host."""
        num_steps = 0
        with self.hooks:
            for batch in self.batches:
                self.hooks.before_run(num_steps)
                outputs = self.step(self.backend.feed(batch.replicas))
                num_steps += 1
                drained = self.drain.submit(num_steps, outputs, batch.rows)
                self.hooks.after_run(num_steps, outputs[0].functions.hooks)
                if drained is not None:
                    yield self._with_host_call(drained)
                if self.hooks.context.stop_requested:
                    break
            drained = self.drain.flush()
            if drained is not None:
                yield self._with_host_call(drained)

    def _with_host_call(self, step: DrainedStep) -> DrainedStep:
        host_call = step.functions.host_call

        def call() -> None:
            assert host_call is not None
            with summary.as_default(self.writer, self.global_step):
                run_host_function("host_call", host_call, step.tensors["host_call"], step=step.step)

        if host_call is not None:
            self.executor.submit(step.step, call)
        return step


def select_predictions(predictions: Any, predict_keys: Sequence[str] | None) -> Any:
    """Returns the named predictions as arrays, or all of them.

    Raises:
      ConfigError: names are given but the predictions are a single tensor, or no name is among them.
    """
    if not isinstance(predictions, Mapping):
        if predict_keys is not None:
            raise ConfigError("predict_keys argument is not valid in case of non-dict predictions.")
        return to_numpy(predictions[0] if isinstance(predictions, list) else predictions)
    if predict_keys is None:
        return {key: to_numpy(tensor) for key, tensor in predictions.items()}
    chosen = {key: to_numpy(tensor) for key, tensor in predictions.items() if key in predict_keys}
    if not chosen:
        raise ConfigError(f"Expected to run at least one output from {sorted(predictions)}; got predict_keys="
                          f"{list(predict_keys)}.")
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
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).detach().numpy()
