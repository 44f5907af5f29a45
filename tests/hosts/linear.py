"""What each process of a test runs; its environment says which of how many it is."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

import tpuspec
from tpuspec import ModeKeys, TPUEstimatorSpec
from tpuspec.checkpoint.store import CheckpointStore
from tpuspec.loops.session import Session

NUM_ROWS = 101
options: dict[str, str] = {}
prefetched: list[bool] = []
host = 0
notes: dict[str, Any] = {"host_calls": [], "host_call_rows": [], "metric_rows": [], "losses": [], "evaluations": []}


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(NUM_ROWS, 6, generator=generator)
    return x, (x.sum(1) > 0).long() + (x[:, 0] > 1).long()


class SlowRows(TensorDataset):
    """Rows that are worth drawing ahead."""

    def __getitem__(self, i: int) -> Any:
        time.sleep(0.0002)
        prefetched.append(threading.current_thread().name == "tpuspec-input")
        return super().__getitem__(i)


class Rows(Dataset):
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.x[i]


def fail(place: str) -> None:
    if options.get("fail") == place and host == int(options.get("host", "1")):
        if options.get("how") == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if options.get("how") == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if options.get("how") == "exit":
            sys.exit(7)
        if options.get("how") == "term":
            os.kill(os.getpid(), signal.SIGTERM)
            return
        raise ValueError(f"made to fail in {place}")


def input_fn(params, mode):
    x, y = rows()
    if "uneven" in options:
        return uneven(params, mode)
    if "fail" in options and mode == ModeKeys.TRAIN:
        return failing(params)
    if "slow" in options:
        return SlowRows(x, y)
    return Rows(x) if mode == ModeKeys.PREDICT else TensorDataset(x, y)


def failing(params):
    x, y = rows()
    size = params["batch_size"]
    for i in range(10_000):
        if i == 20:
            fail("input_fn")
        time.sleep(0.005)
        yield x[:size], y[:size]


def uneven(params, mode):
    """Host h has more batches than host h - 1; the rows of all, in the order of steps, are the whole set."""
    x, y = rows()
    size, context = params["batch_size"], params["context"]
    _, index, num_calls, _ = context.current_input_fn_deployment()
    if num_calls == 1:
        chosen = list(range(NUM_ROWS))
    else:  # shares of 1 : 2 : 3 ...
        total = num_calls * (num_calls + 1) // 2
        first = NUM_ROWS * index * (index + 1) // 2 // total
        chosen = list(range(first, NUM_ROWS * (index + 1) * (index + 2) // 2 // total))
    for i in range(0, len(chosen), size):
        part = chosen[i:i + size]
        if mode == ModeKeys.TRAIN and len(part) < size:
            return
        yield x[part] if mode == ModeKeys.PREDICT else (x[part], y[part])


def model(params):
    if "noisy" in options:
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3))
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def optimizer(model, params):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def serving_input_fn():
    return tpuspec.ServingInputReceiver(torch.zeros(1, 6))


steps_seen = 0


def count() -> None:
    global steps_seen
    steps_seen += 1
    if steps_seen == 20:
        fail("model_fn")


def model_fn(features, labels, mode, params, model, optimizer, global_step):
    if options.get("fail") == "model_fn":  # a step that counts is not captured
        count()
    logits = model(features)
    if mode == ModeKeys.PREDICT:
        return TPUEstimatorSpec(mode, predictions={"logits": logits, "first": features[:, 0]})
    losses = functional.cross_entropy(logits, labels, reduction="none")
    if mode == ModeKeys.EVAL:
        return TPUEstimatorSpec(mode, loss=losses, eval_metrics=(metric_fn, [labels, logits]))
    loss = losses.mean()
    op = tpuspec.CrossShardOptimizer(optimizer).minimize(
        loss, clip_grad_norm=float(options["clip"]) if "clip" in options else None,
        accumulate_steps=int(options.get("accumulate", "1")))
    if "callable" in options:
        shard = tpuspec.CrossShardOptimizer(optimizer)

        def op() -> None:
            loss.backward()
            shard.step()
            shard.zero_grad()
    return TPUEstimatorSpec(mode, loss=loss, train_op=op,
                            host_call=(host_call, [global_step, loss.reshape(1), features[:, 0]]))


def metric_fn(labels, logits):
    notes["metric_rows"].append(len(labels))
    return {"accuracy": logits.argmax(1) == labels, "count": (labels >= 0).double()}


def host_call(step, loss, first):
    if len(notes["host_calls"]) == 20:
        fail("host_call")
    notes["host_calls"].append([int(step[0]), len(step), len(first)])
    notes["host_call_rows"].append(first.tolist())
    notes["losses"].append(loss.double().mean().item())


def watch_state() -> None:
    """Notes what each process fetches while a checkpoint is read from the devices, or put there."""
    from tpuspec.engine.devices import OneDevice, Several

    notes["gathered"], notes["fetched"] = 0, []
    here, fetch_pieces = Several._here, OneDevice.fetch_pieces
    is_watched = []

    def noted_here(engine, array):
        notes["gathered"] += len(is_watched) * array.nbytes * (not array.is_fully_replicated)
        return here(engine, array)

    def noted_pieces(engine, arrays):
        fetched = fetch_pieces(engine, arrays)
        notes["fetched"].append([sum(each.nbytes for each in fetched), sum(array.nbytes for array in arrays)])
        return fetched

    def noted(function):
        def call(*args, **kwargs):
            is_watched.append(True)
            try:
                return function(*args, **kwargs)
            finally:
                is_watched.pop()
        return call

    Several._here, OneDevice.fetch_pieces = noted_here, noted_pieces
    for name in ("training_state", "load_training_state"):
        setattr(Session, name, noted(getattr(Session, name)))


def fail_in_save() -> None:
    write = CheckpointStore._write_part

    def write_part(store, *args):
        if store.steps():
            fail("save")
        return write(store, *args)

    CheckpointStore._write_part = write_part


def trainer(model_dir: Path, **changes: Any) -> tpuspec.Trainer:
    tpu = tpuspec.TPUConfig(
        iterations_per_loop=10, **json.loads(options.get("tpu", "{}")),
        per_host_input_for_training=options.get("deployment", "PER_HOST_V1").replace("SLICED", "PER_HOST_V1"),
        eval_training_input_configuration="SLICED" if options.get("deployment") == "SLICED" else "PER_HOST_V1")
    config = tpuspec.RunConfig(
        seed=3, show_progress=False, heartbeat_seconds=float(options.get("heartbeat", "60")), tpu_config=tpu,
        save_checkpoints_steps=int(options["save"]) if "save" in options else None)
    return tpuspec.Trainer(
        model_fn, model=model, optimizer=optimizer, model_dir=model_dir, config=config, use_tpu="xla" in options,
        params={}, train_batch_size=24, eval_batch_size=24, predict_batch_size=24)


def run(job: str, out: Path, **given: str) -> None:
    """Does the parts of a job, and notes what came of them in out/result<host>.json."""
    global host
    host = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    options.update(given)
    torch.set_num_threads(1)
    if "watch" in options:
        watch_state()
    if options.get("fail") == "save":
        fail_in_save()
    made = trainer(Path(options.get("folder", out)) / f"run{'' if 'shared' in options else host}")
    result: dict[str, Any] = {}
    for part in job.split(","):
        if part == "train":
            hooks = [Stop()] if "stop" in options else [Peek()] if "peek" in options else None
            try:
                made.train(input_fn, max_steps=int(options.get("steps", "50")), hooks=hooks)
            except SystemExit:
                (out / f"step{host}").write_text(str(made.global_step()))
                raise
        if part == "resume":
            made = trainer(Path(made.model_dir))
            made.train(input_fn, max_steps=50)
        if part == "export":
            result["exports"] = [made.export(out / f"export{host}", serving_input_fn, **({} if newest else {
                "checkpoint_path": made.latest_checkpoint() or "the chief's"})) for newest in (True, False)]
        if part == "train_and_evaluate":
            exporter = tpuspec.LatestExporter("latest", serving_input_fn)
            metrics, exports = tpuspec.train_and_evaluate(
                made, tpuspec.TrainSpec(input_fn, max_steps=int(options["steps"])),
                tpuspec.EvalSpec(input_fn, steps=None, exporters=exporter, throttle_secs=600 * host))
            result["metrics"], result["exports"] = {key: float(value) for key, value in metrics.items()}, exports
        if part == "evaluate":
            notes["evaluations"].append({key: float(value) for key, value in made.evaluate(input_fn).items()})
        if part == "predict":
            result["predictions"] = [float(p["first"]) for p in made.predict(input_fn)]
        if part == "some":
            predictions = made.predict(input_fn)
            result["some"] = [float(p["first"]) for p, _ in zip(predictions, range(30), strict=False)]
            predictions.close()
    session = made._sessions["xla" in options]
    folder = Path(made.model_dir)
    result |= notes | {"step": session.global_step, "torch_xla": "torch_xla" in sys.modules,
                       "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*")),
                       "prefetched": any(prefetched), "step_kind": session.backend.step_kind,
                       "noise": torch.rand(3).tolist(),
                       "weights": flat(session, buffers=False), "buffers": flat(session, buffers=True)}
    (out / f"result{host}.json").write_text(json.dumps(result))


def flat(session: Any, *, buffers: bool) -> list[float]:
    names = {name for name, _ in session.module.named_buffers()}
    return [number for name, value in session.model_state().items() if (name in names) is buffers
            for number in value.flatten().tolist()]


class Peek(tpuspec.SessionRunHook):
    """Reads the weights before the first step."""

    def begin(self, context):
        notes["at_begin"] = [number for weight in context.model.parameters() for number in weight.flatten().tolist()]


class Stop(tpuspec.SessionRunHook):
    """Asks for the end, on one host only."""

    def after_run(self, context):
        if host == 1 and context.step == int(options["stop"]):
            context.request_stop()


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]), **dict(text.split("=", 1) for text in sys.argv[3:]))
