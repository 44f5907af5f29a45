"""User code that fails as its params say: place, how, and at which step."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

import tpuspec
from tests.regression import regression_rows
from tpuspec import ModeKeys, TPUEstimatorSpec
from tpuspec.checkpoint.store import CheckpointStore
from tpuspec.loops import export_folder
from tpuspec.spec.phase import current_phase

SIGNALLED_FILE = "signalled"
USER_CODE = ("input_fn", "model_fn", "host_call", "metric_fn", "nowhere", "disk", "serving_input_fn", "export_trace",
             "export_files")


def go_wrong(how: str) -> None:
    """Fails in one of the ways that user code can, or gets a signal."""
    if how == "hang":
        while True:
            time.sleep(0.01)
    if how == "exit":
        raise SystemExit(7)
    if how == "memory":
        raise MemoryError("by the test")
    if how == "unpicklable":
        class Local(Exception):
            def __reduce__(self):
                raise TypeError("cannot be pickled")

        raise Local("by the test")
    if how == "raise":
        raise ZeroDivisionError("by the test")
    for _ in range(2 if how == "twice" else 1):
        Path(SIGNALLED_FILE).write_text(repr(time.monotonic()))  # one clock for all processes
        os.kill(os.getpid(), signal.SIGINT if how == "SIGINT" else signal.SIGTERM)
        time.sleep(0.3)


def wait_for_phase(params) -> None:
    """Fails on a thread once the run is in a phase, but for the save of the first state."""
    while current_phase() != params["place"]:
        time.sleep(0.0005)
    go_wrong(params["how"])


watches = False


def model(params):
    global watches
    if params["place"] == "disk":
        CheckpointStore.save = lambda *given: time.sleep(1000)
    if params["place"] not in USER_CODE and not watches:
        watches = True
        threading.Thread(target=wait_for_phase, args=(params,), daemon=True).start()
    return nn.Sequential(nn.Linear(1, 8), *(nn.Linear(8, 8) for _ in range(params["num_layers"])), nn.Linear(8, 1))


class Rows(Dataset):
    def __init__(self, params, mode):
        self.params, self.rows = params, regression_rows(64)
        self.fails = params["place"] == "input_fn" and mode == ModeKeys.TRAIN

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        if self.fails and i == 4 * (self.params["step"] - 1):
            go_wrong(self.params["how"])
        time.sleep(0.0005)  # as a disk would take
        return self.rows[i]


def input_fn(params, mode):
    rows = Rows(params, mode)
    if mode != ModeKeys.TRAIN:
        return rows
    if not params["num_workers"]:
        return batches(rows)
    return DataLoader(rows, batch_size=4, num_workers=params["num_workers"])


def batches(rows):
    while True:
        for first in range(0, len(rows), 4):
            chosen = [rows[i] for i in range(first, first + 4)]
            yield torch.stack([x for x, _ in chosen]), torch.stack([y for _, y in chosen])


def serving_input_fn(params):
    if params["place"] == "serving_input_fn":
        go_wrong(params["how"])
    if params["place"] == "export_files":
        write_file, written = export_folder.write_file, []

        def fail_at_the_third(path, chunks):
            written.append(path)
            if len(written) == 3:
                go_wrong(params["how"])
            return write_file(path, chunks)

        export_folder.write_file = fail_at_the_third
    return tpuspec.ServingInputReceiver(torch.zeros(1, 1))


num_traces = 0
num_evaluated = 0


def model_fn(features, labels, mode, params, model, optimizer, global_step):
    global num_traces
    prediction = model(features)
    if mode == ModeKeys.PREDICT:
        if params["place"] == "export_trace" and torch.compiler.is_exporting() and not params["use_tpu"]:
            go_wrong(params["how"])
        return TPUEstimatorSpec(mode, predictions={"y": prediction})

    def metric_fn(labels, prediction):
        global num_evaluated
        num_evaluated += 1
        if params["place"] == "metric_fn" and num_evaluated == params["step"]:
            go_wrong(params["how"])
        return {"error": (labels - prediction).abs().squeeze(1)}

    def host_call(step, loss):
        if params["place"] == "host_call" and int(step[0]) + 1 == params["step"]:
            go_wrong(params["how"])

    losses = F.mse_loss(prediction, labels, reduction="none").squeeze(1)
    if mode == ModeKeys.EVAL:
        return TPUEstimatorSpec(mode, loss=losses, eval_metrics=(metric_fn, [labels, prediction]))
    if params["place"] == "model_fn":  # else it would keep steps from being captured
        num_traces += 1
        if num_traces == 2:  # behind the rehearsal
            go_wrong(params["how"])
    loss = losses.mean()
    if params["how"] == "not_a_number":
        loss = loss * torch.where(global_step[0] + 1 == params["step"], float("nan"), 1.0)
    train_op = tpuspec.CrossShardOptimizer(optimizer).minimize(loss)
    return TPUEstimatorSpec(mode, loss=loss, train_op=train_op, host_call=(host_call, [global_step, loss.reshape(1)]))
