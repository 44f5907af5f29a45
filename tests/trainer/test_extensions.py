"""What can be put beside or in the place of tpuspec's own: writers, a backend, what a hook reads."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tpuspec
from tpuspec.errors import ConfigTypeError, HostCallError
from tpuspec.testing import FakeBackend

EXTENDING = (Path(__file__).parents[2] / "docs/extending.md").read_text("utf-8")


def metric_fn(losses):
    return {"largest": losses.max()}


def model_fn(features, labels, mode, params, model, optimizer, global_step):
    losses = F.mse_loss(model(features), labels, reduction="none").mean(1)
    if mode == tpuspec.ModeKeys.EVAL:
        return tpuspec.TPUEstimatorSpec(mode, loss=losses, eval_metrics=(metric_fn, [losses]))
    loss = losses.mean()

    def host_call(step, loss):
        if params.get("fails_at") == int(step[0]):
            raise ValueError("asked for")

    return tpuspec.TPUEstimatorSpec(
        mode, loss=loss, train_op=tpuspec.CrossShardOptimizer(optimizer).minimize(loss),
        host_call=(host_call, [global_step, loss.reshape(1)]))


def input_fn(params):
    for k in range(8):
        x = torch.full((4, 2), float(k + 1))
        yield x, x.sum(1, keepdim=True)


def trainer_of(tmp_path, params=None, *, loops=1, **arguments):
    torch.manual_seed(0)
    return tpuspec.Trainer(
        model_fn, model=lambda params: nn.Linear(2, 1), params={**(params or {})},
        optimizer=lambda model, params: torch.optim.SGD(model.parameters(), lr=0.001), model_dir=tmp_path / "run",
        train_batch_size=4, eval_batch_size=4, predict_batch_size=4,
        config=tpuspec.RunConfig(seed=0, show_progress=False, save_summary_steps=1,
                                 tpu_config=tpuspec.TPUConfig(iterations_per_loop=loops)), **arguments)


class Noting(tpuspec.SessionRunHook):
    def __init__(self):
        self.seen, self.at_end = [], None

    def begin(self, context):
        self.seen.append((context.step, context.loss, context.metrics))

    def after_run(self, context):
        self.seen.append((context.step, context.loss, context.metrics))
        if context.mode == tpuspec.ModeKeys.TRAIN:
            (group,) = context.optimizer.param_groups
            group["lr"] *= 0.5

    def end(self, context):
        self.at_end = context.metrics


def test_a_hook_reads_loss_optimizer_and_metrics(tmp_path):
    hook, in_evaluation = Noting(), Noting()
    trainer = trainer_of(tmp_path, loops=2, backend=lambda config: FakeBackend(num_replicas=1))
    trainer.train(input_fn, steps=4, hooks=[hook])
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    written = {line["step"]: line["value"] for line in lines if line["name"] == "loss"}
    assert [step for step, _, _ in hook.seen] == [0, 2, 4]
    assert hook.seen[0][1:] == (None, None)
    assert [loss for _, loss, _ in hook.seen[1:]] == [pytest.approx(written[step]) for step in (2, 4)]
    results = trainer.evaluate(input_fn, hooks=[in_evaluation])
    assert in_evaluation.at_end == results and in_evaluation.seen[0][2] is None
    again = Noting()
    trainer.train(input_fn, steps=2, hooks=[again])
    assert again.seen[0][2] == results


def test_a_loss_that_a_hook_reads_raises_what_the_host_work_before_it_raised(tmp_path):
    trainer = trainer_of(tmp_path, {"fails_at": 1}, loops=2, backend=lambda config: FakeBackend(num_replicas=1))
    with pytest.raises(HostCallError, match="host_call raised ValueError at step 2"):
        trainer.train(input_fn, steps=4, hooks=[Noting()])


def test_the_writer_of_the_docs_gets_what_tensorboard_gets(tmp_path):
    names: dict = {}
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", EXTENDING, re.DOTALL) if "class Tracker" in block]
    exec(code, names)
    made = []

    def make(folder):
        made.append(names["Tracker"](folder, rows := []))
        made[-1].rows = rows
        return made[-1]

    trainer = trainer_of(tmp_path, backend=lambda config: FakeBackend(num_replicas=1), summary_writers=[make])
    trainer.train(input_fn, steps=3)
    trainer.evaluate(input_fn)
    train, evaluation = made
    assert [row for row in train.rows if row[0].endswith("loss")] and {row[2] for row in train.rows} == {1, 2, 3}
    assert [row[0] for row in evaluation.rows if "largest" in row[0]] == ["eval/largest"]


@pytest.mark.parametrize(("arguments", "says"), [
    ({"summary_writers": ["tensorboard"]}, "summary_writers must be a list of functions"),
    ({"summary_writers": 1}, "summary_writers must be a list of functions"),
    ({"backend": "gpu"}, "backend must be a function of the RunConfig"),
])
def test_something_else_is_refused(arguments, says, tmp_path):
    with pytest.raises(ConfigTypeError, match=says):
        trainer_of(tmp_path, **arguments)
