"""The captured step: bit-equal to tracing, and never silently wrong."""

from __future__ import annotations

import contextlib
import copy
import itertools
import re
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tpuspec import CrossShardOptimizer, ModeKeys, RunConfig, SessionRunHook, TPUConfig, TPUEstimatorSpec, Trainer
from tpuspec.errors import CaptureError

NUM_STEPS, BATCH = 50, 8


def batches(make, num_batches=5):
    generator = torch.Generator().manual_seed(3)
    drawn = [make(generator) for _ in range(num_batches)]
    return lambda params: itertools.cycle(drawn)


def images(generator):
    return torch.randn(BATCH, 1, 8, 8, generator=generator), torch.randint(0, 10, (BATCH,), generator=generator)


def images_of_mode(params, mode):
    """An input_fn: endless batches in TRAIN, 45 rows, which no batch size divides, otherwise."""
    if mode == ModeKeys.TRAIN:
        return batches(images)(params)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(45, 1, 8, 8, generator=generator)
    return torch.utils.data.TensorDataset(x, torch.randint(0, 10, (45,), generator=generator))


def rows(generator):
    return torch.randn(BATCH, 4, generator=generator), torch.randint(0, 3, (BATCH,), generator=generator)


def text(generator):
    drawn = torch.randint(0, 32, (BATCH, 9), generator=generator)
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def classify(features, labels, mode, params, model, optimizer):
    """Cross entropy of logits over the last axis; minimize() takes params['minimize']."""
    logits = model(features)
    if mode == ModeKeys.PREDICT:
        return TPUEstimatorSpec(mode, predictions={"logits": logits})
    losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    if mode == ModeKeys.EVAL:
        return TPUEstimatorSpec(mode, loss=losses.reshape(len(labels), -1).mean(1), eval_metrics=(
            lambda labels, logits: {"accuracy": (logits.argmax(-1) == labels).float()}, [labels, logits]))
    loss = losses.mean()
    return TPUEstimatorSpec(
        mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss, **params.get("minimize", {})),
        host_call=(lambda loss: RECORDED.extend(loss.tolist()), [loss.reshape(1)]))


RECORDED: list[float] = []


def conv_net():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2),
                         nn.Linear(256, 10))


class TiedText(nn.Module):
    """A tiny causal language model; its output layer is its embedding."""

    def __init__(self, width=16, vocabulary=32):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, dropout=0.1, batch_first=True)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Parameter(torch.ones(width), requires_grad=False)

    def forward(self, x):
        h = self.embed(x) * self.frozen
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        n = self.norm(h)
        return self.head(h + self.attention(n, n, n, attn_mask=mask, need_weights=False)[0])


def run(capture, model_fn, model, optimizer, input_fn, tmp_path, *, params=None, steps=NUM_STEPS, config=None,
        loop=10, hooks=(), steps_per_execution=1, **arguments):
    """Trains a copy of a model; returns (losses, state dict, Trainer)."""
    torch.manual_seed(11)
    RECORDED.clear()
    trainer = Trainer(
        model_fn, model=copy.deepcopy(model), optimizer=optimizer, params=params or {}, train_batch_size=BATCH,
        eval_batch_size=BATCH, predict_batch_size=BATCH,
        model_dir=tmp_path / f"{capture}{len(list(tmp_path.iterdir()))}",
        config=RunConfig(seed=5, show_progress=False, capture=capture, save_checkpoints_steps=None,
                         save_checkpoints_secs=None, tpu_config=TPUConfig(
                             iterations_per_loop=loop, steps_per_execution=steps_per_execution),
                         **({"audit_every_steps": 9} | (config or {}))),
        **arguments)
    trainer.train(input_fn, steps=steps, hooks=list(hooks))
    session = trainer._sessions[True]
    state = session.model_state()
    for optimizer_ in session.replicas[0].optimizers.values():
        for i, values in enumerate(optimizer_.state.values()):
            state |= {f"optimizer {i} {k}": v.detach().cpu() for k, v in getattr(values, "items", dict().items)()
                      if isinstance(v, torch.Tensor)}
    return list(RECORDED), state, trainer


def kind(trainer):
    return trainer._sessions[True].backend.step_kind


def assert_same(first, second):
    assert first[0] == second[0]
    assert len(first[0]) > 0
    assert first[1].keys() == second[1].keys()
    for name, value in first[1].items():
        assert torch.equal(value, second[1][name]), name


def sgd(model, params):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def adamw(model, params):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def with_schedule(make_scheduler, make_optimizer=sgd):
    """An optimizer whose schedule is stepped by a hook after each loop of one step."""
    made = []

    def make(model, params):
        optimizer = make_optimizer(model, params)
        made.append(make_scheduler(optimizer))
        return optimizer

    class Step(SessionRunHook):
        def after_run(self, context):
            made[-1].step()

    return make, Step


PARITY = {
    "conv, BatchNorm, dropout, AdamW": (conv_net, adamw, images, {}),
    "text, tied and frozen weights, clipping, accumulation": (
        TiedText, adamw, text, {"minimize": {"clip_grad_norm": 0.5, "accumulate_steps": 3}}),
    "rows, SGD without momentum": (
        lambda: nn.Linear(4, 3), lambda model, params: torch.optim.SGD(model.parameters(), lr=0.1), rows, {}),
}


@pytest.mark.parametrize("case", PARITY)
def test_a_captured_run_has_the_bits_of_a_traced_one(case, tmp_path):
    make_model, optimizer, make_batch, params = PARITY[case]
    torch.manual_seed(0)
    model = make_model()
    traced = run("off", classify, model, optimizer, batches(make_batch), tmp_path, params=params)
    captured = run("require", classify, model, optimizer, batches(make_batch), tmp_path, params=params)
    assert kind(traced[2]) == "traced"
    assert kind(captured[2]) == "replay"
    assert_same(traced, captured)


def gan_model():
    return nn.ModuleDict({"generator": nn.Linear(2, 4), "critic": nn.Linear(4, 1)})


def gan(features, labels, mode, params, model, optimizer):
    """Two optimizers in one step, through a callable train_op."""
    noise = torch.randn(BATCH, 2, device=features.device)
    fake = model["generator"](noise)
    critic_loss = F.softplus(-model["critic"](features)).mean() + F.softplus(model["critic"](fake.detach())).mean()

    def train_op():
        critic, generator = CrossShardOptimizer(optimizer["critic"]), CrossShardOptimizer(optimizer["generator"])
        critic_loss.backward()
        critic.step()
        critic.zero_grad()
        F.softplus(-model["critic"](fake)).mean().backward()
        generator.step()
        generator.zero_grad()
        critic.zero_grad()

    return TPUEstimatorSpec(mode, loss=critic_loss, train_op=train_op,
                            host_call=(lambda loss: RECORDED.append(loss.item()), [critic_loss.reshape(1)]))


def test_two_optimizers_replay_with_the_same_bits(tmp_path):
    def optimizers(model, params):
        return {"critic": torch.optim.Adam(model["critic"].parameters(), lr=1e-2),
                "generator": torch.optim.SGD(model["generator"].parameters(), lr=1e-2, momentum=0.9)}

    torch.manual_seed(0)
    model = gan_model()
    traced = run("off", gan, model, optimizers, batches(rows), tmp_path)
    captured = run("require", gan, model, optimizers, batches(rows), tmp_path)
    assert kind(captured[2]) == "replay"
    assert_same(traced, captured)


@pytest.mark.parametrize("make_optimizer", [sgd, adamw])
def test_a_scheduled_learning_rate_replays_with_the_same_bits(make_optimizer, tmp_path):
    def cosine(optimizer):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)

    def trained(capture):
        optimizer, step = with_schedule(cosine, make_optimizer)
        torch.manual_seed(0)
        RECORDED.clear()
        trainer = Trainer(classify, model=nn.Linear(4, 3), optimizer=optimizer, params={}, train_batch_size=BATCH,
                          model_dir=tmp_path / capture,
                          config=RunConfig(seed=5, show_progress=False, capture=capture,
                                           tpu_config=TPUConfig(iterations_per_loop=1)))
        trainer.train(batches(rows), steps=30, hooks=[step()])
        return list(RECORDED), trainer._sessions[True].model_state(), trainer

    assert_same(trained("off"), trained("require"))


def test_eval_and_predict_replay_with_the_same_values(tmp_path):
    torch.manual_seed(0)
    model = conv_net()
    traced, captured = (run(capture, classify, model, adamw, images_of_mode, tmp_path, steps=5)[2]
                        for capture in ("off", "require"))
    assert traced.evaluate(images_of_mode) == captured.evaluate(images_of_mode)
    assert kind(captured) == "replay"
    for one, other in zip(traced.predict(images_of_mode), captured.predict(images_of_mode), strict=True):
        assert (one["logits"] == other["logits"]).all()
    assert kind(captured) == "replay"
    # Training goes on from what the evaluation left alone.
    traced.train(images_of_mode, steps=5)
    captured.train(images_of_mode, steps=5)
    for name, value in traced._sessions[True].model_state().items():
        assert torch.equal(value, captured._sessions[True].model_state()[name]), name


CALLS: list[int] = []
COUNTER = {"calls": 0}


def counting(features, labels, mode, params, model, optimizer):
    COUNTER["calls"] += 1
    scale = 2.0 if COUNTER["calls"] % 3 == 0 else 1.0
    return classify(features * scale, labels, mode, params, model, optimizer)


def appending(features, labels, mode, params, model, optimizer):
    CALLS.append(len(CALLS))
    return classify(features, labels, mode, params, model, optimizer)


def reading(features, labels, mode, params, model, optimizer):
    if features.sum().item() > 0:
        features = features * 2
    return classify(features, labels, mode, params, model, optimizer)


def host_noise(features, labels, mode, params, model, optimizer):
    noise = torch.randn(features.shape)
    return classify(features + noise.to(features.device), labels, mode, params, model, optimizer)


def carrying(features, labels, mode, params, model, optimizer):
    """Carries a device tensor from step to step, outside the state that tpuspec knows."""
    previous = KEPT.get("features")
    KEPT["features"] = features * 0.5 if previous is None else previous * 0.5 + features * 0.5
    return classify(KEPT["features"], labels, mode, params, model, optimizer)


KEPT: dict[str, torch.Tensor] = {}


def own_schedule(features, labels, mode, params, model, optimizer):
    optimizer.param_groups[0]["lr"] *= 0.99
    return classify(features, labels, mode, params, model, optimizer)


BREAKS = {
    "a branch on a counter": (counting, "changes what Python code remembers: COUNTER"),
    "a list that grows": (appending, "changes what Python code remembers: number of items in CALLS"),
    "item()": (reading, r"reads a value from the device at test_capture.py:\d+"),
    "random numbers of the host": (host_noise, "torch's random numbers on the host"),
    "a tensor carried along": (carrying, "changes what Python code remembers: KEPT|leaves 1 tensors behind"),
    "a learning rate of its own": (own_schedule, "optimizer lr of group 0"),
}


def reset():
    COUNTER["calls"] = 0
    CALLS.clear()
    KEPT.clear()


@pytest.mark.parametrize("case", BREAKS)
def test_what_cannot_be_replayed_is_traced_with_one_message(case, tmp_path, caplog):
    model_fn, message = BREAKS[case]
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    reset()
    traced = run("off", model_fn, model, sgd, batches(rows), tmp_path, steps=14)
    reset()
    captured = run("auto", model_fn, model, sgd, batches(rows), tmp_path, steps=14)
    assert kind(captured[2]) == "traced"
    assert_same(traced, captured)
    told = [record.message for record in caplog.records if "cannot be captured" in record.message]
    assert len(told) == 1
    assert re.search(message, told[0]), told[0]
    reset()


@pytest.mark.parametrize("case", BREAKS)
def test_require_raises_what_auto_would_warn_of(case, tmp_path):
    model_fn, message = BREAKS[case]
    reset()
    with pytest.raises(CaptureError, match=message):
        run("require", model_fn, nn.Linear(4, 3), sgd, batches(rows), tmp_path, steps=14)
    reset()


def test_predictions_and_metrics_that_are_views_are_replayed(tmp_path):
    def model_fn(features, labels, mode, params, model, optimizer):
        output = model(features).squeeze(1)
        losses = (output - labels).square()
        if mode == ModeKeys.EVAL:
            return TPUEstimatorSpec(mode, loss=losses, eval_metrics=(lambda output: {"output": output}, [output]))
        loss = losses.mean()
        return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss))

    def input_fn(params, mode):
        drawn = batches(lambda g: (torch.randn(BATCH, 4, generator=g), torch.randn(BATCH, generator=g)))(params)
        return drawn if mode == ModeKeys.TRAIN else list(itertools.islice(drawn, 8))

    torch.manual_seed(0)
    trainer = run("require", model_fn, nn.Linear(4, 1), sgd, input_fn, tmp_path, steps=5)[2]
    first = trainer.evaluate(input_fn)
    assert kind(trainer) == "replay"
    assert trainer.evaluate(input_fn) == first


class Warming(nn.Module):
    """Makes a table on its first call, as lazy caches do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.table = None

    def forward(self, x):
        if self.table is None:
            self.table = torch.arange(4, device=x.device) * 0.5
        return self.linear(x + self.table)


def test_a_cache_that_the_first_call_fills_is_no_hindrance(tmp_path):
    torch.manual_seed(0)
    model = Warming()
    traced = run("off", classify, model, sgd, batches(rows), tmp_path, steps=14)
    captured = run("require", classify, model, sgd, batches(rows), tmp_path, steps=14)
    assert kind(captured[2]) == "replay"
    assert_same(traced, captured)


SCALE = {"value": 1.0}


def scaled(features, labels, mode, params, model, optimizer):
    return classify(features * SCALE["value"], labels, mode, params, model, optimizer)


class Rescale(SessionRunHook):
    def after_run(self, context):
        SCALE["value"] = 1.0 + 0.1 * (context.step // 10)


def test_a_value_that_a_hook_changes_is_captured_anew_and_told_of(tmp_path, caplog):
    def trained(capture):
        SCALE["value"] = 1.0
        torch.manual_seed(0)
        RECORDED.clear()
        trainer = Trainer(scaled, model=nn.Linear(4, 3), optimizer=sgd, params={}, train_batch_size=BATCH,
                          model_dir=tmp_path / capture,
                          config=RunConfig(seed=5, show_progress=False, capture=capture,
                                           tpu_config=TPUConfig(iterations_per_loop=5)))
        trainer.train(batches(rows), steps=45, hooks=[Rescale()])
        return list(RECORDED), trainer._sessions[True].model_state(), trainer

    traced, captured = trained("off"), trained("require")
    assert_same(traced, captured)
    assert any("captured 3 times: a Python value that the step reads changed" in record.message
               for record in caplog.records)


@contextlib.contextmanager
def changing_behind(step):
    """Yields a model_fn, and a hook that changes what it computes after a step.

    What model_fn looks up by name in another module is not seen beforehand: only tracing again shows the change.
    """
    module = types.ModuleType("sly")
    module.scale = 1.0

    def model_fn(features, labels, mode, params, model, optimizer):
        return classify(features * sys.modules["sly"].scale, labels, mode, params, model, optimizer)

    class Change(SessionRunHook):
        def after_run(self, context):
            module.scale = 2.0 if context.step >= step else 1.0

    sys.modules["sly"] = module
    try:
        yield model_fn, Change()
    finally:
        del sys.modules["sly"]


def test_what_a_hook_changes_where_no_code_names_it_counts_from_the_next_loop_on(tmp_path):
    results = []
    for capture in ("off", "require"):
        with changing_behind(20) as (model_fn, change):
            torch.manual_seed(0)
            results.append(run(capture, model_fn, nn.Linear(4, 3), sgd, batches(rows), tmp_path, hooks=[change]))
    assert_same(*results)
    assert kind(results[1][2]) == "replay"


def test_an_audit_finds_a_step_that_changed_behind_the_capture(tmp_path):
    def input_fn(params):
        for number, batch in enumerate(batches(rows)(params)):
            sys.modules["sly"].scale = 2.0 if number >= 20 else 1.0
            yield batch

    with changing_behind(1000) as (model_fn, _), pytest.raises(
            CaptureError, match="no longer what was captured: a number in it changes"):
        run("auto", model_fn, nn.Linear(4, 3), sgd, input_fn, tmp_path, steps=80, loop=80)


def test_reading_a_weight_within_a_loop_is_an_error(tmp_path):
    def input_fn(params):
        for i, batch in enumerate(batches(rows)(params)):
            if i >= 25:  # the first of these steps may be traced, on a machine that is busy
                trainer._sessions[True].module.weight.detach().cpu()
            yield batch

    trainer = Trainer(classify, model=nn.Linear(4, 3), optimizer=sgd, params={}, train_batch_size=BATCH,
                      model_dir=tmp_path, config=RunConfig(seed=5, show_progress=False,
                                                           tpu_config=TPUConfig(iterations_per_loop=20)))
    with pytest.raises(RuntimeError, match="donated|in flight") as raised:
        trainer.train(input_fn, steps=40)
    assert "only at loop boundaries" in "".join(raised.value.__notes__)


@pytest.mark.parametrize("through_data", [False, True])
def test_what_is_written_to_a_weight_within_a_loop_is_not_kept(through_data, tmp_path):
    """The newest state lives in the program then, and the next boundary gives it back."""
    def writing(params):
        for i, batch in enumerate(batches(rows)(params)):
            if i == 30:
                weight = trainer._sessions[True].module.weight
                with torch.no_grad():
                    (weight.data if through_data else weight).copy_(torch.zeros(3, 4))
            yield batch

    found = []
    for input_fn in (batches(rows), writing):
        torch.manual_seed(0)
        trainer = Trainer(classify, model=nn.Linear(4, 3), optimizer=sgd, params={}, train_batch_size=BATCH,
                          model_dir=tmp_path / input_fn.__name__, config=RunConfig(
                              seed=5, show_progress=False, tpu_config=TPUConfig(iterations_per_loop=20)))
        trainer.train(input_fn, steps=40)
        found.append(trainer._sessions[True].model_state())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_step_writes_every_state_where_it_was(tmp_path):
    """XLA pairs donated buffers with outputs by size and order alone; a wrong pair costs copies of both."""
    places: list[dict[str, int]] = []

    class Places(SessionRunHook):
        def after_run(self, context):
            session = trainer._sessions[True]
            replica = session.replicas[0]
            state = {name: value for name, value in replica.model.named_parameters()
                     if value.requires_grad and "unused" not in name}
            for index, values in enumerate(replica.optimizers[""].state.values()):
                state |= {f"{index} {key}": value for key, value in values.items() if value.ndim}
            places.append({name: array.unsafe_buffer_pointer() for name, array in zip(
                state, session.backend.arrays_of(list(state.values())), strict=True)})

    trainer = Trainer(classify, model=TiedText(), optimizer=adamw, train_batch_size=BATCH, model_dir=tmp_path,
                      config=RunConfig(show_progress=False, capture="require", save_checkpoints_steps=None,
                                       save_checkpoints_secs=None, tpu_config=TPUConfig(iterations_per_loop=5)))
    trainer.train(batches(text), steps=25, hooks=[Places()])
    assert kind(trainer) == "replay"
    assert len(places[-1]) > 15
    assert places[-1] == places[-2] == places[-3]
