"""The numbers of optimizers: inputs of one program, whoever moves them, and what plain PyTorch computes with them."""

from __future__ import annotations

import copy
import itertools
import math
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import swa_utils

from tests.tracer.test_capture import BATCH, RECORDED, assert_same, batches, classify, kind, rows, run, sgd
from tpuspec import ModeKeys, RunConfig, SessionRunHook, TPUConfig, TPUEstimatorSpec, Trainer
from tpuspec.errors import CaptureError


class Counting(torch.optim.Optimizer):
    """Counts in Python, as hand-written optimizers do: in the state, in its groups and in itself."""

    def __init__(self, params, lr=0.05):
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "k": 0})
        self.calls = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.calls += 1
        for group in self.param_groups:
            group["k"] += 1
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"], state["mean"], state["square"] = 0, torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                state["mean"].mul_(beta1).add_(p.grad, alpha=1 - beta1)
                state["square"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                scale = math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
                if self.calls % 3 == 0:
                    p.mul_(1 - 0.1 / group["k"] + sum(range(group["k"] % 2)))
                p.addcdiv_(state["mean"], state["square"].sqrt().add_(1e-8), value=-group["lr"] * scale)


class OfLists(torch.optim.Optimizer):
    """Computes with torch's operations on lists, and counts in a tensor of the host."""

    def __init__(self, params, lr=0.05):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("step", torch.tensor(0.0)).add_(1)
            params = group["params"]
            rate = group["lr"] / (1 + self.state[params[0]]["step"] / 10)
            torch._foreach_add_(params, [p.grad for p in params], alpha=-rate.item())
            torch._foreach_mul_(params, 1 - group["lr"] ** 2)


class Decaying(torch.optim.Adam):
    """Calls the step of its base class, whose hooks run too once an Adam has been made in the process."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(1 - group["lr"] * 0.1 / self.state[p]["step"].item())


class Wrapping(torch.optim.Optimizer):
    """Steps another optimizer within its own step, and shares its groups."""

    def __init__(self, base):
        self.base = base
        super().__init__([p for group in base.param_groups for p in group["params"]], {"k": 0})
        self.param_groups = base.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        before = [p.clone() for group in self.param_groups for p in group["params"]]
        self.base.step()
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for p, old in zip(group["params"], before, strict=True):
                p.lerp_(old, 0.5 / group["k"])


def plainly(make_optimizer, model, num_steps=50, change=None):
    """Trains a copy in plain PyTorch; returns its weights and the optimizer."""
    plain = copy.deepcopy(model)
    optimizer = make_optimizer(plain, {})
    for number, (features, labels) in enumerate(itertools.islice(batches(rows)({}), num_steps)):
        if change is not None:
            change(optimizer, number)
        F.cross_entropy(plain(features), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return plain.state_dict(), optimizer


def assert_close(state, expected):
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-6, msg=name)


def programs_of(trainer):
    return trainer._sessions[True]._compiled[ModeKeys.TRAIN]._step._programs.kept


@pytest.mark.parametrize(("kind_of", "num_programs"), [(Counting, 3), (OfLists, 1)])
def test_a_custom_optimizer_that_counts_on_the_host_is_replayed(kind_of, num_programs, tmp_path):
    def make(model, params):
        return kind_of(model.parameters())

    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    traced = run("off", classify, model, make, batches(rows), tmp_path)
    captured = run("require", classify, model, make, batches(rows), tmp_path, loop=25)
    assert kind(captured[2]) == "replay"
    assert len(programs_of(captured[2])) == num_programs
    assert_same(traced, captured)
    expected, optimizer = plainly(make, model)
    assert_close(captured[1], expected)
    own = captured[2]._sessions[True].replicas[0].optimizers[""]
    assert [s["step"] for s in own.state.values()] == [s["step"] for s in optimizer.state.values()]
    assert all(type(s["step"]) is type(t["step"]) for s, t in
               zip(own.state.values(), optimizer.state.values(), strict=True))
    assert vars(own).get("calls") == vars(optimizer).get("calls")
    assert own.param_groups[0].get("k") == optimizer.param_groups[0].get("k")


def test_an_optimizers_step_may_call_that_of_its_base_class(tmp_path):
    def make(model, params):
        return Decaying(model.parameters(), lr=0.05)

    torch.optim.Adam(nn.Linear(1, 1).parameters())
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    traced = run("off", classify, model, make, batches(rows), tmp_path)
    captured = run("require", classify, model, make, batches(rows), tmp_path, loop=25)
    assert kind(captured[2]) == "replay"
    assert_same(traced, captured)
    assert_close(captured[1], plainly(make, model)[0])


@pytest.mark.parametrize("kind_of", [torch.optim.Adam, Decaying])
def test_an_optimizer_that_steps_another_is_traced_and_told_of(kind_of, tmp_path, caplog):
    def make(model, params):
        return Wrapping(kind_of(model.parameters(), lr=0.05))

    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    done = run("auto", classify, model, make, batches(rows), tmp_path, loop=25)
    assert kind(done[2]) == "traced"
    assert_close(done[1], plainly(make, model)[0])
    assert f"Wrapping keeps another optimizer ({kind_of.__name__}, in its attribute 'base')" in caplog.text


class ChangeRate(SessionRunHook):
    """Sets another rate at every boundary."""

    def after_run(self, context):
        OPTIMIZER[-1].param_groups[0]["lr"] = rate_at(context.step)


OPTIMIZER: list[torch.optim.Optimizer] = []


def rate_at(step):
    return 0.1 / (1 + step // 5)


def change_rate(optimizer, number):
    if number and number % 5 == 0:
        optimizer.param_groups[0]["lr"] = rate_at(number)


def noting(make):
    def made(model, params):
        OPTIMIZER.append(make(model, params))
        return OPTIMIZER[-1]
    return made


@pytest.mark.parametrize("num_at_once", [1, 5])
def test_a_rate_that_a_hook_changes_at_every_boundary_costs_no_capture(num_at_once, tmp_path, caplog):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    result = run("require", classify, model, noting(sgd), batches(rows), tmp_path, loop=5, hooks=[ChangeRate()],
                 config={"audit_every_steps": 1000}, steps_per_execution=num_at_once)
    if num_at_once == 1:  # else each program of five steps is the one that is traced after the hook
        assert kind(result[2]) == "replay"
        assert len(programs_of(result[2])) == 1
    assert "captured" not in caplog.text
    expected, _ = plainly(sgd, model, change=change_rate)
    assert_close(result[1], expected)


class ByRatio(torch.optim.SGD):
    """Reads its rate where it is not followed."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad * operator.truediv(*group["lr"].as_integer_ratio()))


class ByInt(torch.optim.SGD):
    """Reads its rate by a conversion, which is noted."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad * (int(group["lr"] * 1000) / 1000))


@pytest.mark.parametrize("kind_of", [ByRatio, ByInt])
def test_a_number_that_is_not_followed_is_another_program_where_it_changes(kind_of, tmp_path):
    def make(model, params):
        return kind_of(model.parameters(), lr=0.1)

    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    result = run("auto", classify, model, noting(make), batches(rows), tmp_path, loop=5, hooks=[ChangeRate()],
                 config={"audit_every_steps": 1000})
    expected, _ = plainly(make, model, change=change_rate)
    assert_close(result[1], expected)


def test_a_number_that_is_not_followed_and_always_moves_is_refused_by_name(tmp_path):
    def make(model, params):
        return ByRatio(model.parameters(), lr=0.1)

    with pytest.raises(CaptureError, match="a number in it changes from step to step"):
        run("require", classify, nn.Linear(4, 3), make, batches(rows), tmp_path,
            scheduler=lambda optimizer, params: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))


def adam(model, params):
    return torch.optim.Adam(model.parameters(), lr=0.05)


@pytest.mark.parametrize("capture", ["require", "off"])
def test_counts_of_steps_are_torchs_own_at_boundaries(capture, tmp_path):
    seen = []

    class Look(SessionRunHook):
        def after_run(self, context):
            step = next(iter(OPTIMIZER[-1].state.values()))["step"]
            seen.append((step.item(), step.device.type, type(OPTIMIZER[-1].param_groups[0]["lr"])))

    run(capture, classify, nn.Linear(4, 3), noting(adam), batches(rows), tmp_path, loop=5, steps=20, hooks=[Look()])
    assert seen == [(step, "cpu", float) for step in (5.0, 10.0, 15.0, 20.0)]


def test_a_checkpoint_resumes_in_plain_torch_and_one_with_counts_on_the_device_resumes_here(tmp_path):
    def trainer(folder, use_tpu, **flags):
        torch.manual_seed(0)
        return Trainer(classify, model=nn.Linear(4, 3), optimizer=lambda model, params: torch.optim.Adam(
            model.parameters(), lr=0.05, **flags), params={}, train_batch_size=BATCH, model_dir=tmp_path / folder,
            use_tpu=use_tpu, config=RunConfig(seed=5, show_progress=False, allow_inexact_resume=True,
                                              tpu_config=TPUConfig(iterations_per_loop=5)))

    def input_fn(params):
        yield from itertools.islice(batches(rows)(params), 15)

    def weights(trained):
        return next(iter(trained._sessions.values())).model_state()

    trainer("one", True, capturable=True).train(input_fn, max_steps=15)
    on_host, on_device = trainer("one", False), trainer("two", True, capturable=True)
    on_host.train(input_fn, max_steps=30)
    trainer("two", False).train(input_fn, max_steps=15)
    on_device.train(input_fn, max_steps=30)
    assert_close(weights(on_device), weights(on_host))
    assert on_device._sessions[True].replicas[0].optimizers[""].param_groups[0]["capturable"] is True


def test_a_step_that_fails_puts_the_counts_back(tmp_path):
    class Failing(torch.optim.Adam):
        fails = False

        def step(self, closure=None):
            super().step(closure)
            if self.fails:
                raise RuntimeError("in the middle")

    class Fail(SessionRunHook):
        def after_run(self, context):
            OPTIMIZER[-1].__class__.fails = context.step == 2

    make = noting(lambda model, params: Failing(model.parameters(), lr=0.05))
    with pytest.raises(RuntimeError, match="in the middle"):
        run("auto", classify, nn.Linear(4, 3), make, batches(rows), tmp_path, loop=1, hooks=[Fail()])
    assert [state["step"].item() for state in OPTIMIZER[-1].state.values()] == [2.0, 2.0]
    assert type(OPTIMIZER[-1].param_groups[0]["lr"]) is float


class Keeping(nn.Module):
    """Keeps its loss in buffers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("last", torch.zeros(()))
        self.register_buffer("too", torch.zeros(()))

    def forward(self, x):
        return self.layer(x)


def kept_loss(features, labels, mode, params, model, optimizer):
    loss = F.cross_entropy(model(features), labels)

    def train_op():
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if params["how"] == "copied":
        model.last.copy_(loss.detach())
    else:
        model.last = loss.detach() if params["how"] == "assigned" else loss
        model.too = loss.detach()
    return TPUEstimatorSpec(mode, loss=loss if params["how"] == "itself" else model.last, train_op=train_op,
                            host_call=(lambda loss: RECORDED.extend(loss.tolist()), [model.last.reshape(1)]))


@pytest.mark.parametrize("how", ["copied", "assigned", "itself"])
def test_a_loss_that_is_a_buffer_is_that_of_its_step(how, tmp_path):
    torch.manual_seed(0)
    model = Keeping()
    arguments = (kept_loss, model, sgd, batches(rows), tmp_path)
    traced, captured = (run(capture, *arguments, params={"how": how}, steps=12) for capture in ("off", "auto"))
    assert_same(traced, captured)
    features, labels = next(batches(rows)({}))
    assert captured[0][0] == pytest.approx(F.cross_entropy(model(features), labels).item(), abs=1e-6)
    assert captured[1]["last"].item() == captured[0][-1]


class Sharing(torch.optim.SGD):
    """Counts under a key of its own in its state."""

    def step(self, closure=None):
        self.state["calls"] = self.state.get("calls", 0) + 1
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(1 / self.state["calls"])
        return super().step(closure)


def test_a_plain_int_in_the_state_is_followed(tmp_path):
    def make(model, params):
        return Sharing(model.parameters(), lr=0.1)

    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    result = run("require", classify, model, noting(make), batches(rows), tmp_path)
    assert kind(result[2]) == "replay"
    assert OPTIMIZER[-1].state["calls"] == 50
    expected, _ = plainly(make, model)
    assert_close(result[1], expected)


AVERAGES = {
    "equal weights": {}, "equal weights of lists": {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()},
    "decay": {"avg_fn": swa_utils.get_ema_avg_fn(0.9), "use_buffers": True},
    "decay of lists": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9), "use_buffers": True}}


def averaging(features, labels, mode, params, model, optimizer):
    loss = F.cross_entropy(model["net"](features), labels)

    def train_op():
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model["average"].update_parameters(model["net"])

    return TPUEstimatorSpec(mode, loss=loss, train_op=train_op)


@pytest.mark.parametrize("how", AVERAGES)
def test_an_averaged_model_is_replayed_and_averages_as_plain_pytorch(how, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    net.register_buffer("scale", torch.tensor(2.0))
    made = nn.ModuleDict({"net": net, "average": swa_utils.AveragedModel(net, **AVERAGES[how])})

    def make(model, params):
        return torch.optim.SGD(model["net"].parameters(), lr=0.1, momentum=0.9)

    plain = copy.deepcopy(made)
    optimizer = make(plain, {})
    for features, labels in itertools.islice(batches(rows)({}), 20):
        averaging(features, labels, "train", {}, plain, optimizer).train_op()
    result = run("require", averaging, made, make, batches(rows), tmp_path, steps=20)
    assert kind(result[2]) == "replay"
    assert_close(result[1], plain.state_dict())
