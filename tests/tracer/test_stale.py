"""No replay goes on with an old program: what changes at step 20 of 40 has the losses of `capture=off`, or is an error.

Each case is one way in which Python code may come to do something else, at a loop boundary or within a loop.
"""

from __future__ import annotations

import contextvars
import cProfile
import itertools
import logging
import os
import pstats
import random
import time
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.tracer.test_capture import assert_same, batches, kind, rows, run, sgd
from tpuspec import CrossShardOptimizer, ModeKeys, SessionRunHook, TPUEstimatorSpec
from tpuspec.errors import CaptureError

BY_NAME = {"fn": torch.tanh, "scale": 1.0}
RATE = 1.0
CONTEXT = contextvars.ContextVar("scale", default=1.0)
RECORDED: list[float] = []


def activation(x):
    return x * 1.0


def wave(x):
    return torch.sin(x)


def scale_of_environment():
    return float(os.environ.get("TPUSPEC_TEST_SCALE", "1"))


def half(model, gradient):
    return (gradient[0] * 0.5,)


class Settings:
    scale = 1.0

    def __init__(self):
        self.factor = np.float32(1.0)
        self.array = np.ones(3, dtype=np.float32)
        self.tensor = torch.ones(3)

    @property
    def product(self):
        return float(self.factor)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)
        self.act, self.settings, self.on_device = torch.tanh, Settings(), None
        self._hidden_scale = 1.0

    @property
    def scale(self):
        return self._hidden_scale

    def forward(self, x):
        x = self.second(self.act(self.inner(x * self.scale)))
        x = x * self.settings.product * self.settings.scale
        x = x * torch.from_numpy(self.settings.array.copy()).to(x.device)[0] * self.settings.tensor.to(x.device)[0]
        return self.out(self.helped(x))

    def helped(self, x):
        return scaled_by_helper(self, x)


def scaled_by_helper(net, x):
    return x * getattr(net, "by_helper", 1.0)


class Fixture:
    """What a model_fn reads, and what a case changes."""

    def __init__(self):
        self.device_tensor = None
        self.model = Net()
        self.namespace = types.SimpleNamespace(rate=1.0)


def make_model_fn(fixture):
    def model_fn(features, labels, mode, params, model, optimizer):
        x = activation(features) * RATE * BY_NAME["scale"] * CONTEXT.get() * scale_of_environment()
        x = BY_NAME["fn"](x) * fixture.namespace.rate
        if fixture.device_tensor is not None:
            x = x * fixture.device_tensor.to(x.device)
        loss = F.cross_entropy(model(x), labels)
        return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss),
                                host_call=(lambda loss: RECORDED.extend(loss.tolist()), [loss.reshape(1)]))
    return model_fn


def globally(name, value):
    return lambda model, fixture: globals().__setitem__(name, value)


def put(owner, name, value):
    return lambda model, fixture: setattr(owner(model, fixture), name, value)


def swap(model, fixture):
    model.inner, model.second = model.second, model.inner


def write_array(model, fixture):
    model.settings.array[:] = 3.0


def write_tensor(model, fixture):
    model.settings.tensor.fill_(3.0)


def write_device_tensor(model, fixture):
    with torch.no_grad():
        fixture.device_tensor.fill_(3.0)


def hook_module(model, fixture):
    model.second.register_forward_hook(lambda module, args, output: output * 2)


def hook_tensor(model, fixture):
    model.out.weight.register_hook(lambda gradient: gradient * 0.5)


def leave_gradient(model, fixture):
    model.out.weight.grad = torch.ones_like(model.out.weight)


def set_environment(model, fixture):
    os.environ["TPUSPEC_TEST_SCALE"] = "3"


AT_A_BOUNDARY = {
    "an attribute behind a property": put(lambda m, f: m, "_hidden_scale", 3.0),
    "an attribute that a helper reads": put(lambda m, f: m, "by_helper", 3.0),
    "a class attribute": put(lambda m, f: Settings, "scale", 3.0),
    "a numpy scalar": put(lambda m, f: m.settings, "factor", np.float32(3.0)),
    "a function of the module": put(lambda m, f: m, "act", torch.sigmoid),
    "a function in a dict": lambda m, f: BY_NAME.__setitem__("fn", torch.sigmoid),
    "a function of this file": globally("activation", wave),
    "a global": globally("RATE", 3.0),
    "a number in a dict": lambda m, f: BY_NAME.__setitem__("scale", 3.0),
    "the environment": set_environment,
    "a context variable": lambda m, f: CONTEXT.set(3.0),
    "a namespace": put(lambda m, f: f.namespace, "rate", 3.0),
    "a module's hook": hook_module,
    "a tensor's hook": hook_tensor,
    "an array in place": write_array,
    "a host tensor in place": write_tensor,
    "a device tensor of a closure": write_device_tensor,
    "a gradient": leave_gradient,
    "two layers of one shape": swap,
    "a method": put(lambda m, f: Net, "helped", lambda self, x: x * 3.0),
}


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Puts all that a case changes back."""
    helped, scale, token = Net.helped, Settings.scale, CONTEXT.set(1.0)
    kept, by_name = {name: globals()[name] for name in ("activation", "RATE")}, dict(BY_NAME)
    monkeypatch.setenv("TPUSPEC_TEST_SCALE", "1")

    def reset():
        Net.helped, Settings.scale = helped, scale
        globals().update(kept)
        BY_NAME.update(by_name)
        CONTEXT.set(1.0)
        os.environ["TPUSPEC_TEST_SCALE"] = "1"

    yield reset
    reset()
    CONTEXT.reset(token)


class At20(SessionRunHook):
    def __init__(self, change, fixture):
        self._change, self._fixture = change, fixture

    def begin(self, context):
        self._fixture.device_tensor = torch.ones((), device=next(context.model.parameters()).device)

    def after_run(self, context):
        if context.step == 20:
            self._change(context.model, self._fixture)


def losses_of(capture, change, tmp_path, reset):
    RECORDED.clear()
    reset()
    torch.manual_seed(0)
    fixture = Fixture()
    _, state, trainer = run(capture, make_model_fn(fixture), fixture.model, sgd, batches(rows), tmp_path, steps=40,
                            hooks=[At20(change, fixture)], config={"audit_every_steps": 1000})
    return list(RECORDED), state, trainer


@pytest.mark.parametrize("case", AT_A_BOUNDARY)
def test_what_a_hook_changes_counts_from_the_next_loop_on(case, as_before, tmp_path):
    change = AT_A_BOUNDARY[case]
    traced, captured = (losses_of(capture, change, tmp_path, as_before) for capture in ("off", "require"))
    assert_same(traced, captured)
    assert kind(captured[2]) == "replay"
    unchanged = losses_of("off", lambda model, fixture: None, tmp_path, as_before)
    assert traced[0][:20] == unchanged[0][:20]
    assert traced[0] != unchanged[0]


class Counting:
    """Things that change what a step does at every tenth call."""

    def __init__(self):
        self.num_calls = 0
        self.items = itertools.cycle([1.0] * 9 + [3.0])
        self.cells = iter([1.0, 1.0, 3.0] * 100)
        self.generator = self.generated()
        self.random, self.numpy = random.Random(3), np.random.RandomState(3)
        self.new_numpy, self.torch = np.random.default_rng(3), torch.Generator().manual_seed(3)

    def generated(self):
        for number in range(1000):
            yield 3.0 if number % 10 == 9 else 1.0

    def attribute(self):
        self.num_calls += 1
        return 3.0 if self.num_calls % 10 == 0 else 1.0

    def of_the_class(self):
        Counted.num_calls += 1
        return 3.0 if Counted.num_calls % 10 == 0 else 1.0

    def of_a_function(self):
        activation.num_calls = getattr(activation, "num_calls", 0) + 1
        return 3.0 if activation.num_calls % 10 == 0 else 1.0


class Counted:
    num_calls = 0


class Lookahead(torch.optim.SGD):
    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)
        self.k = 0

    def step(self, closure=None):
        super().step(closure)
        self.k += 1
        if self.k % 10 == 0:
            with torch.no_grad():
                for parameter in self.param_groups[0]["params"]:
                    parameter.mul_(0.5)


class Every(nn.Module):
    """Counts its calls in a hook."""

    def __init__(self, counting):
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.inner.register_forward_hook(lambda module, args, output: output * counting.attribute())

    def forward(self, x):
        return self.inner(x)


WITHIN_A_STEP = {
    "an attribute": Counting.attribute, "a class attribute": Counting.of_the_class,
    "a function's attribute": Counting.of_a_function, "an iterator": lambda c: next(c.items),
    "a list's iterator": lambda c: next(c.cells), "a generator": lambda c: next(c.generator),
    "its own random.Random": lambda c: c.random.random(), "a RandomState": lambda c: float(c.numpy.rand()),
    "a numpy generator": lambda c: float(c.new_numpy.random()),
    "a torch generator": lambda c: torch.rand((), generator=c.torch).item(),
    "the clock": lambda c: float(time.time() % 7 > 3), "os.urandom": lambda c: float(os.urandom(1)[0] > 128),
}


@pytest.mark.parametrize("case", WITHIN_A_STEP)
def test_what_a_step_draws_or_counts_is_never_replayed(case, as_before, tmp_path, caplog):
    draw = WITHIN_A_STEP[case]

    def model_fn_of(counting):
        def model_fn(features, labels, mode, params, model, optimizer):
            loss = F.cross_entropy(model(features * draw(counting)), labels)
            return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss))
        return model_fn

    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    with pytest.raises(CaptureError, match="cannot be captured"):
        run("require", model_fn_of(Counting()), model, sgd, batches(rows), tmp_path, steps=40)
    Counted.num_calls = activation.num_calls = 0
    traced = run("off", model_fn_of(Counting()), model, sgd, batches(rows), tmp_path, steps=40)
    Counted.num_calls = activation.num_calls = 0
    captured = run("auto", model_fn_of(Counting()), model, sgd, batches(rows), tmp_path, steps=40)
    assert kind(captured[2]) == "traced"
    if case not in ("the clock", "os.urandom"):
        assert all(torch.equal(value, captured[1][name]) for name, value in traced[1].items())
    assert caplog.text.count("cannot be captured") == 1


def plain(features, labels, mode, params, model, optimizer):
    loss = F.cross_entropy(model(features), labels)
    return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss))


@pytest.mark.parametrize(("case", "expected"), [
    ("an optimizer's own attribute", "replay"),  # it is one of the optimizer's numbers
    ("a counter in a module's hook", "traced")])
def test_what_optimizers_and_hooks_count_is_never_a_constant_of_a_replay(case, expected, tmp_path):
    def make():
        torch.manual_seed(0)
        if case == "a counter in a module's hook":
            return Every(Counting()), sgd
        return nn.Linear(4, 3), lambda model, params: Lookahead(model.parameters())

    results = [run(capture, plain, *make(), batches(rows), tmp_path, steps=64) for capture in ("off", "auto")]
    assert kind(results[1][2]) == expected
    assert all(torch.equal(value, results[1][1][name]) for name, value in results[0][1].items())


READS = {
    "to(device=)": lambda x: x.to(device="cpu"), "copy_": lambda x: torch.zeros(()).copy_(x),
    "torch.tensor": lambda x: torch.tensor(x, device="cpu"), "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.cpu().numpy(), "item": lambda x: x.item(),
}


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.parametrize("case", READS)
def test_a_read_of_the_device_is_found_by_whatever_call(case, tmp_path):
    def model_fn(features, labels, mode, params, model, optimizer):
        scale = 3.0 if float(READS[case](features.detach().sum())) > 0 else 1.0
        return plain(features * scale, labels, mode, params, model, optimizer)

    torch.manual_seed(0)
    with pytest.raises(CaptureError, match=r"reads a value from the device at test_stale.py:\d+"):
        run("require", model_fn, nn.Linear(4, 3), sgd, batches(rows), tmp_path, steps=40)


def test_evaluation_sees_what_changed_between_two_calls(tmp_path):
    def input_fn(params, mode):
        if mode == ModeKeys.TRAIN:
            return batches(rows)(params)
        generator = torch.Generator().manual_seed(4)
        return torch.utils.data.TensorDataset(torch.randn(32, 4, generator=generator),
                                              torch.randint(0, 3, (32,), generator=generator))

    def model_fn(features, labels, mode, params, model, optimizer):
        loss = F.cross_entropy(model(features * BY_NAME["scale"]), labels)
        if mode == ModeKeys.EVAL:
            return TPUEstimatorSpec(mode, loss=loss)
        return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss))

    torch.manual_seed(0)
    model, losses = nn.Linear(4, 3), []
    for capture in ("off", "require"):
        BY_NAME["scale"] = 1.0
        trainer = run(capture, model_fn, model, sgd, input_fn, tmp_path, steps=10)[2]
        first = [trainer.evaluate(input_fn)["loss"] for _ in range(2)]
        BY_NAME["scale"] = 3.0
        losses.append([*first, trainer.evaluate(input_fn)["loss"]])
    assert losses[0] == losses[1]
    assert losses[0][1] != losses[0][2]


@pytest.mark.parametrize("who", ["the input", "a host function"])
def test_what_changes_within_a_loop_is_an_error(who, tmp_path):
    calls = itertools.count()

    def model_fn(features, labels, mode, params, model, optimizer):
        loss = F.cross_entropy(model(features * BY_NAME["scale"]), labels)

        def host_call(loss):
            if who == "a host function" and next(calls) == 20:
                BY_NAME["scale"] = 3.0

        return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss),
                                host_call=(host_call, [loss.reshape(1)]))

    def input_fn(params):
        for number, batch in enumerate(batches(rows)(params)):
            if who == "the input" and number == 23:
                BY_NAME["scale"] = 3.0
            yield batch

    with pytest.raises(CaptureError, match="changed.*between two steps of a loop|no longer what was captured"):
        run("auto", model_fn, nn.Linear(4, 3), sgd, input_fn, tmp_path, steps=600, loop=100,
            config={"audit_every_steps": 1000})


def test_large_data_is_not_read_through(tmp_path):
    class Lazy(dict):
        """Loads what is asked for."""

        def items(self):
            raise AssertionError("read through")

        __iter__ = keys = values = __getitem__ = items

    table, lazy = {number: [number] for number in range(300_000)}, Lazy({1: 2})

    def model_fn(features, labels, mode, params, model, optimizer):
        assert len(table) + len(lazy) > 300_000
        return plain(features, labels, mode, params, model, optimizer)

    trainer = run("require", model_fn, nn.Linear(4, 3), sgd, batches(rows), tmp_path, steps=60, loop=5)[2]
    assert kind(trainer) == "replay"


LOGGER = logging.getLogger("tests.stale")


def test_loggers_that_are_made_in_mid_loop_are_no_change_of_one_that_the_step_has(tmp_path):
    def model_fn(features, labels, mode, params, model, optimizer):
        LOGGER.debug("a step")
        return plain(features, labels, mode, params, model, optimizer)

    def input_fn(params):
        for number, batch in enumerate(batches(rows)(params)):
            logging.getLogger(f"tests.stale.{number}")
            yield batch

    torch.manual_seed(0)
    assert kind(run("require", model_fn, nn.Linear(4, 3), sgd, input_fn, tmp_path, steps=40)[2]) == "replay"


def test_a_training_may_be_profiled(tmp_path):
    torch.manual_seed(0)
    profile = cProfile.Profile()
    profile.enable()
    try:
        done = run("require", plain, nn.Linear(4, 3), sgd, batches(rows), tmp_path, steps=12)
    finally:
        profile.disable()
    assert kind(done[2]) == "replay"
    names = {name for _, _, name in pstats.Stats(profile).stats}
    assert {"plain", "_replay"} <= names  # it goes on after a traced step
