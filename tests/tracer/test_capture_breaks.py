"""Ways of breaking capture beyond those of test_capture.py: shapes, accumulation, other threads."""

from __future__ import annotations

import itertools
import random
import re
import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.tracer.test_capture import (
    BATCH,
    RECORDED,
    assert_same,
    batches,
    classify,
    kind,
    rows,
    run,
    sgd,
)
from tpuspec import CrossShardOptimizer, SessionRunHook, TPUEstimatorSpec
from tpuspec.errors import CaptureError, ConfigError
from tpuspec.spec.user_threads import USER_THREADS

NUM_TRACES = {"count": 0}


def masked_rows(params):
    """Batches whose masks leave all rows at first, as padding does that comes late."""
    generator = torch.Generator().manual_seed(3)
    for number in itertools.count():
        features, labels = rows(generator)
        if number >= 8:
            features[:number % BATCH, 0] = -100.0
        yield features, labels


def minimized(losses, optimizer):
    loss = losses.mean()
    return TPUEstimatorSpec("train", loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss),
                            host_call=(lambda loss: RECORDED.extend(loss.tolist()), [loss.reshape(1)]))


def indexing_with_a_mask(features, labels, mode, params, model, optimizer):
    kept = features[:, 0] > -50
    return minimized(F.cross_entropy(model(features[kept]), labels[kept], reduction="none"), optimizer)


def selecting_by_a_mask(features, labels, mode, params, model, optimizer):
    losses = F.cross_entropy(model(features), labels, reduction="none")
    return minimized(torch.masked_select(losses, features[:, 0] > -50), optimizer)


def cutting_by_a_count(features, labels, mode, params, model, optimizer):
    NUM_TRACES["count"] += 1
    num_rows = BATCH - NUM_TRACES["count"] % 2
    return minimized(F.cross_entropy(model(features[:num_rows]), labels[:num_rows], reduction="none"), optimizer)


def computing_on_the_host(features, labels, mode, params, model, optimizer):
    """torch.linalg.lstsq is none of XLA's; on the first batches its result is the same."""
    solved = torch.linalg.lstsq(torch.eye(2, device=features.device) * features[:2, :1].clamp(max=-50) / -50,
                                torch.ones(2, 1, device=features.device)).solution
    return minimized(F.cross_entropy(model(features), labels, reduction="none") * solved.mean(), optimizer)


SHAPES = {
    "indexing with a mask": (
        indexing_with_a_mask, r"shape depends on values at test_capture_breaks.py:\d+, by nonzero.*torch.where"),
    "masked_select": (selecting_by_a_mask, r"shape depends on values at test_capture_breaks.py:\d+"),
    "a slice by a counter": (cutting_by_a_count, "changes what Python code remembers: NUM_TRACES"),
    "an operation that XLA lacks": (computing_on_the_host, r"XLA has no \w+ at test_capture_breaks.py:\d+"),
}


@pytest.mark.parametrize("case", SHAPES)
def test_shapes_that_change_are_traced_with_one_message(case, tmp_path, caplog):
    model_fn, message = SHAPES[case]
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    NUM_TRACES["count"] = 0
    traced = run("off", model_fn, model, sgd, masked_rows, tmp_path, steps=14)
    NUM_TRACES["count"] = 0
    captured = run("auto", model_fn, model, sgd, masked_rows, tmp_path, steps=14)
    assert kind(captured[2]) == "traced"
    assert_same(traced, captured)
    told = [record.message for record in caplog.records if "cannot be captured" in record.message]
    assert len(told) == 1
    assert re.search(message, told[0]), told[0]
    with pytest.raises(CaptureError, match=message):
        run("require", model_fn, model, sgd, masked_rows, tmp_path, steps=14)


@pytest.mark.parametrize(("capture", "reason"), [("off", "capture=auto would say why"), ("auto", "NUM_TRACES")])
def test_what_it_costs_to_compile_each_step_anew_is_said_once(capture, reason, tmp_path, caplog):
    def turning(features, labels, mode, params, model, optimizer):
        NUM_TRACES["count"] += 1
        features = features if capture == "off" else features.sigmoid()  # whose graphs this process has not compiled
        return classify(features.flatten().roll(NUM_TRACES["count"]).view_as(features), labels, mode, params, model,
                        optimizer)

    NUM_TRACES["count"] = 0
    run(capture, turning, nn.Linear(4, 3), sgd, batches(rows), tmp_path, steps=14)
    told = [record.message for record in caplog.records if "is compiled anew" in record.message]
    assert len(told) == 1
    assert re.search(rf"4 times for one form of batch; the newest took [\d.e-]+ s: .*{reason}", told[0]), told[0]
    caplog.clear()
    run(capture, classify, nn.Linear(4, 3), sgd, batches(rows), tmp_path, steps=8)
    assert "is compiled anew" not in caplog.text


KEPT: dict[str, torch.Tensor] = {}


def keeping_while_accumulating(features, labels, mode, params, model, optimizer):
    """Carries a device tensor from batch to batch, while gradients accumulate."""
    previous = KEPT.get("features")
    KEPT["features"] = features * 0.5 if previous is None else previous * 0.5 + features * 0.5
    return classify(KEPT["features"], labels, mode, {"minimize": {"accumulate_steps": 3}}, model, optimizer)


def test_a_tensor_carried_along_while_gradients_accumulate_keeps_its_value(tmp_path, caplog):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    KEPT.clear()
    traced = run("off", keeping_while_accumulating, model, sgd, batches(rows), tmp_path, steps=8)
    KEPT.clear()
    captured = run("auto", keeping_while_accumulating, model, sgd, batches(rows), tmp_path, steps=8)
    assert kind(captured[2]) == "traced"
    assert_same(traced, captured)
    assert any("cannot be captured" in record.message for record in caplog.records)
    KEPT.clear()


def test_a_tensor_in_a_host_functions_closure_while_gradients_accumulate_is_found(tmp_path):
    def model_fn(features, labels, mode, params, model, optimizer):
        spec = classify(features, labels, mode, {"minimize": {"accumulate_steps": 2}}, model, optimizer)
        hidden = features.square()
        return spec.replace(host_call=(lambda loss: hidden.shape, [spec.loss.reshape(1)]))

    with pytest.raises(CaptureError, match=r"leaves 1 tensors behind, of shapes \[8, 4\]"):
        run("require", model_fn, nn.Linear(4, 3), sgd, batches(rows), tmp_path, steps=8)


@pytest.fixture
def beside():
    """A module that model_fn looks up by name, unseen by capture: draws on another thread while a step is traced."""
    module = types.ModuleType("beside")
    module.num_left = 0

    def draw():
        if module.num_left > 0:
            module.num_left -= 1
            with USER_THREADS.running():
                random.random()

    def trace():
        thread = threading.Thread(target=draw)
        thread.start()
        thread.join()

    module.trace = trace
    sys.modules["beside"] = module
    yield module
    del sys.modules["beside"]


def traced_beside_a_draw(features, labels, mode, params, model, optimizer):
    sys.modules["beside"].trace()
    return classify(features, labels, mode, params, model, optimizer)


def test_random_numbers_drawn_on_another_thread_meanwhile_are_not_laid_to_model_fn(beside, tmp_path):
    beside.num_left = 6
    captured = run("require", traced_beside_a_draw, nn.Linear(4, 3), sgd, batches(rows), tmp_path, steps=20)
    assert beside.num_left == 0
    assert kind(captured[2]) == "replay"


def test_random_numbers_drawn_beside_every_trace_end_in_tracing(beside, tmp_path, caplog):
    beside.num_left = 1000
    captured = run("auto", traced_beside_a_draw, nn.Linear(4, 3), sgd, batches(rows), tmp_path, steps=30)
    assert kind(captured[2]) == "traced"
    told = [record.message for record in caplog.records if "cannot be captured" in record.message]
    assert len(told) == 1
    assert "Python's random numbers" in told[0]
    assert "it (or a host function, or the input on its own thread) changes" in told[0]


def test_an_audit_beside_a_draw_of_another_thread_says_nothing(beside, tmp_path):
    class DrawFromNowOn(SessionRunHook):
        def after_run(self, context):
            if context.step == 10:
                beside.num_left = 1000

    captured = run("require", traced_beside_a_draw, nn.Linear(4, 3), sgd, batches(rows), tmp_path, steps=40,
                   hooks=[DrawFromNowOn()])
    assert beside.num_left < 1000  # audits took place
    assert kind(captured[2]) == "replay"


def test_sparse_adam_is_refused_before_anything_is_compiled(tmp_path):
    def sparse_adam(model, params):
        return torch.optim.SparseAdam(list(model.parameters()), lr=0.1)

    with pytest.raises(ConfigError, match=r"SparseAdam needs sparse gradients, which XLA does not have\. Take Adam"):
        run("auto", classify, nn.Linear(4, 3), sparse_adam, batches(rows), tmp_path, steps=2)
