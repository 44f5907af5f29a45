"""One of two hosts with an XLA device each, as on a pod: python xla_hosts.py HOST PORT OUT; HOST -1 is alone.

XLA's CPU devices compute together within one process only. Both hosts therefore get the same rows: what the other one
brings to a collective is what this one has, and the mean over both is its own.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

import tpuspec
from tpuspec import ModeKeys, TPUEstimatorSpec
from tpuspec.errors import HostFailureError
from tpuspec.runtime.pod import join_pod
from tpuspec.runtime.xla_replicas import XlaReplicas
from tpuspec.spec.backend import Topology

HOST, PORT, OUT = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
NUM_ROWS, BATCH = 21, 4
notes: dict[str, Any] = {"host_calls": [], "metric_rows": []}
killed_at: int | None = None
stores: list[dist.TCPStore] = []


class OnTwoHosts(XlaReplicas):
    """XLA on one of two hosts whose rows are equal."""

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, tensor])

    def reduce_gradients(self, optimizer: torch.optim.Optimizer, reduction: str) -> None:
        assert reduction == "mean"
        optimizer.step()


def meet(messages):
    store = dist.TCPStore("127.0.0.1", PORT, 2, is_master=HOST == 0)
    stores.append(store)  # the other host may not have read from it yet
    store.set(str(HOST), messages[0])
    return [store.get(host) for host in ("0", "1")]


def start_on_two_hosts() -> None:
    real_start = XlaReplicas.start

    def start(config: tpuspec.RunConfig, **arguments: Any) -> XlaReplicas:
        alone = real_start(config, **arguments)
        topology = Topology(platform="CPU", devices=alone.topology.devices, num_replicas_per_host=1, num_hosts=2,
                            host_index=HOST)
        pod = join_pod(meet, host_index=HOST, num_devices=1, heartbeat_seconds=config.heartbeat_seconds)
        return OnTwoHosts(alone._devices, topology, capture=config.capture, pod=pod)

    XlaReplicas.start = start
    tpuspec.trainer.may_span_hosts = lambda config, *, use_tpu: use_tpu


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(NUM_ROWS, 6, generator=torch.Generator().manual_seed(7))
    return x, (x.sum(1) > 0).long() + (x[:, 0] > 1).long()


def input_fn(params, mode, input_context):
    x, y = rows()
    if mode != ModeKeys.TRAIN:
        return [(x[i:i + BATCH], y[i:i + BATCH]) for i in range(0, NUM_ROWS, BATCH)]
    return Endless(x, y)


class Endless:
    """Full batches without end, which say where they stand."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y, self.i = x, y, 0

    def __iter__(self):
        while True:
            if HOST == 1 and self.i == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            first = self.i % 5 * BATCH
            self.i += 1
            yield self.x[first:first + BATCH], self.y[first:first + BATCH]

    def state_dict(self):
        return {"i": self.i}

    def load_state_dict(self, state):
        self.i = state["i"]


def model_fn(features, labels, mode, params, model, optimizer, global_step):
    logits = model(features)
    if mode == ModeKeys.PREDICT:
        return TPUEstimatorSpec(mode, predictions={"first": features[:, 0]})
    losses = functional.cross_entropy(logits, labels, reduction="none")
    if mode == ModeKeys.EVAL:
        return TPUEstimatorSpec(mode, loss=losses, eval_metrics=(metric_fn, [labels, logits]))
    loss = losses.mean()
    return TPUEstimatorSpec(mode, loss=loss, train_op=tpuspec.CrossShardOptimizer(optimizer).minimize(loss),
                            host_call=(host_call, [global_step, features[:, 0]]))


def metric_fn(labels, logits):
    notes["metric_rows"].append(len(labels))
    return {"accuracy": logits.argmax(1) == labels}


def host_call(step, first):
    notes["host_calls"].append([step.tolist(), first.tolist()])


def make(**arguments: Any) -> tpuspec.Trainer:
    num_hosts = 1 if HOST < 0 else 2
    return tpuspec.Trainer(
        model_fn, model=lambda params: nn.Linear(6, 3), optimizer=lambda model, params: torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9), params={}, model_dir=OUT / f"run{HOST}",
        config=tpuspec.RunConfig(
            show_progress=False, seed=3, heartbeat_seconds=20.0, save_checkpoints_steps=5,
            tpu_config=tpuspec.TPUConfig(iterations_per_loop=5)),
        train_batch_size=BATCH * num_hosts, eval_batch_size=BATCH * num_hosts, predict_batch_size=BATCH * num_hosts,
        **arguments)


def main() -> None:
    if HOST >= 0:
        start_on_two_hosts()
    make().train(input_fn, max_steps=10)
    trainer = make()
    trainer.train(input_fn, max_steps=20)
    metrics = trainer.evaluate(input_fn)
    num_metric_rows = sum(notes["metric_rows"]) - BATCH  # the rehearsal's
    session = trainer._sessions[True]
    result = {
        "metrics": {name: float(value) for name, value in metrics.items()}, "num_metric_rows": num_metric_rows,
        "predictions": [float(row["first"]) for row in trainer.predict(input_fn)],
        "host_calls": list(notes["host_calls"]),
        "native": {name: float(value) for name, value in make(eval_on_tpu=False).evaluate(input_fn).items()},
        "step": session.global_step, "is_chief": trainer.is_chief, "kind": session.backend.step_kind,
        "weights": session.model_state()["weight"].flatten().tolist(),
        # Names of event files hold the time and the process.
        "files": sorted(re.sub(r"tfevents.*", "tfevents", path.name) for path in (OUT / f"run{HOST}").glob("*"))}
    if HOST >= 0:
        global killed_at
        killed_at = 27
        (OUT / f"result{HOST}.json").write_text(json.dumps(result))
        try:
            trainer.train(input_fn, max_steps=1000)
        except HostFailureError as error:
            result["failure"] = str(error)
    (OUT / f"result{HOST}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
