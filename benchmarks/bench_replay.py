"""What does the host pay to replay a step with many tensors, beside a jax.jit call with as many donated arguments?

    python benchmarks/bench_replay.py [--tensors 100 1000] [--repeats 5] [--calls 50]

Both update so many parameters of eight numbers by SGD, and each call's results are waited for before the next, so that
the time of the call is the host's: finding the program, its inputs, starting it, and taking the outputs. A boundary
between loops that nobody reads publishes nothing; what one that is read costs is measured beside it. Prints one JSON
line for each number of tensors (median microseconds a call, smallest and largest, and the ratio to jax.jit's, of the
same repeat). Compiling takes long for thousands of tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from interleave import interleave, median_ratio, spread

WIDTH = 8
NUM_WARM_UP = 8


def replay(num_tensors: int) -> tuple[Callable[[], Any], Callable[[], Any], Callable[[], None]]:
    """Returns what dispatches one step, what publishes the state, and what waits for the device."""
    import torch
    from torch import nn

    from tpuspec import RunConfig, TPUConfig
    from tpuspec.config import CaptureMode
    from tpuspec.select import select
    from tpuspec.spec.results import Batch, StepOutput

    backend = select(RunConfig(capture=CaptureMode.require, audit_every_steps=1 << 30,
                               tpu_config=TPUConfig(num_shards=1)), use_tpu=True)
    (replica,) = backend.place(nn.ParameterList([nn.Parameter(torch.ones(WIDTH)) for _ in range(num_tensors)]))
    assert replica.model is not None
    replica.optimizers[""] = torch.optim.SGD(replica.model.parameters(), lr=1e-3, foreach=False)

    def train(replica: Any, batch: Batch, micro_step: int) -> StepOutput:
        loss = sum((parameter * batch.features).sum() for parameter in replica.model.parameters())
        loss.backward()
        backend.reduce_gradients(replica.optimizers[""], "mean")
        replica.optimizers[""].zero_grad()
        return StepOutput(tensors={"loss": loss.detach()})

    step, newest = backend.compile_step(train, [replica]), [None]
    fed = backend.feed([Batch(features=torch.ones(WIDTH))])  # a replay leaves it as it is

    def dispatch() -> None:
        (newest[0],) = step(fed)

    def wait() -> None:
        backend.fetch([newest[0].tensors["loss"]])

    while backend.step_kind != "replay":
        dispatch()
        wait()
    for _ in range(NUM_WARM_UP):  # the audits at first
        dispatch()
        wait()
    return dispatch, step.publish, wait


def jax_jit(num_tensors: int) -> tuple[Callable[[], Any], Callable[[], None]]:
    """Returns what dispatches one step, and what waits for the device."""
    from functools import partial

    import jax
    import numpy as np

    def loss_of(parameters: list[Any], x: Any) -> Any:
        return sum((parameter * x).sum() for parameter in parameters)

    @partial(jax.jit, donate_argnums=0)
    def step(parameters: list[Any], x: Any) -> tuple[list[Any], Any]:
        loss, gradients = jax.value_and_grad(loss_of)(parameters, x)
        return [each - 1e-3 * gradient for each, gradient in zip(parameters, gradients, strict=True)], loss

    x = np.ones(WIDTH, np.float32)
    held: list[Any] = [[jax.device_put(x) for _ in range(num_tensors)], None]

    def dispatch() -> None:
        held[:] = step(held[0], x)

    def wait() -> None:
        jax.block_until_ready(held)

    for _ in range(NUM_WARM_UP):
        dispatch()
        wait()
    return dispatch, wait


def seconds_of(call: Callable[[], Any], wait: Callable[[], None], num_calls: int) -> float:
    """Returns the median seconds of a call: audits trace a few of them. The waiting between two is left out."""
    seconds = []
    for _ in range(num_calls):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
        wait()
    return statistics.median(seconds)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", nargs="+", type=int, default=[100, 1000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--calls", type=int, default=50, help="of one measurement")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    for num_tensors in arguments.tensors:
        dispatch, publish, wait = replay(num_tensors)
        by_jax, wait_for_jax = jax_jit(num_tensors)

        def read(dispatch=dispatch, publish=publish) -> None:
            publish()
            dispatch()  # takes the state over again

        times = interleave({
            "replay": lambda dispatch=dispatch, wait=wait: seconds_of(dispatch, wait, arguments.calls),
            "published": lambda read=read, wait=wait: seconds_of(read, wait, max(1, arguments.calls // 10)),
            "jax_jit": lambda by_jax=by_jax, wait=wait_for_jax: seconds_of(by_jax, wait, arguments.calls),
        }, arguments.repeats)
        for name, seconds in times.items():
            print(json.dumps({
                "benchmark": "replay", "contender": name, "tensors": num_tensors, "metric": "host time of a call",
                "unit": "us", **spread([each * 1e6 for each in seconds], 1),
                "ratio_to_jax": median_ratio(seconds, times["jax_jit"])}), flush=True)


if __name__ == "__main__":
    main()
