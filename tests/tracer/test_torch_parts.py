"""Modules and functions of torch that XLA or torch_xla breaks without help: each trains as plain PyTorch does."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
import torch_xla.utils.checkpoint as xla_checkpoint
from torch import nn
from torch.nn.utils import rnn
from torch.utils.checkpoint import checkpoint

from tests.tracer.test_capture import batches, kind, rows, run, sgd
from tpuspec import CrossShardOptimizer, RunConfig, TPUConfig, TPUEstimatorSpec, Trainer
from tpuspec.errors import SpecUsageError
from tpuspec.tracer.formulas import register_formulas
from tpuspec.tracer.torch_parts import restore_torch

LENGTHS = torch.tensor([3, 5, 1, 2, 5, 4, 2, 1])


class Checkpointed(nn.Module):
    """Two layers, the first of which may be computed again in the backward pass."""

    def __init__(self, around, drop=0.0):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(drop))
        self.last = nn.Linear(8, 3)
        self.around = around

    def forward(self, x):
        x = x.clone().requires_grad_()  # the reentrant form needs an input with a gradient
        h = self.around(self.first, x)
        return self.last(F.dropout(h, self.first[2].p))


def without(module, x):
    return module(x)


def reentrant(module, x):
    return checkpoint(module, x, use_reentrant=True)


def not_reentrant(module, x):
    return checkpoint(module, x, use_reentrant=False)


def of_torch_xla(module, x):
    return xla_checkpoint.checkpoint(module, x) if x.device.type == "xla" else module(x)


def of_torch_xla_around_a_function(module, x):
    return xla_checkpoint.checkpoint(lambda y: module(y) * 1, x) if x.device.type == "xla" else module(x)


class Recurrent(nn.Module):
    """Reads each row five times, or as often as its length says."""

    def __init__(self, make, packs=False):
        super().__init__()
        self.cells = make(4, 8, batch_first=True, num_layers=2)
        self.last = nn.Linear(8, 3)
        self.packs = packs

    def forward(self, x):
        x = x[:, None] * torch.arange(1, 6, device=x.device)[:, None]
        if not self.packs:
            return self.last(self.cells(x)[0][:, -1])
        packed = rnn.pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
        return self.last(rnn.pad_packed_sequence(self.cells(packed)[0], batch_first=True)[0].sum(1))


class BehindALayer(nn.Module):
    """A BatchNorm in eval mode, whose input needs a gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.norm.running_mean.add_(0.5)
        self.norm.eval()

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu())


class Amplitude(nn.Module):
    """The absolute value of a complex product."""

    def __init__(self):
        super().__init__()
        self.real, self.imaginary = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return torch.complex(self.real(x), self.imaginary(x)).abs()


MODULES = {
    "checkpoint, reentrant": (lambda: Checkpointed(reentrant), "replay"),
    "checkpoint, not reentrant": (lambda: Checkpointed(not_reentrant), "replay"),
    "torch_xla's checkpoint": (lambda: Checkpointed(of_torch_xla), "replay"),
    "torch_xla's checkpoint around a function": (lambda: Checkpointed(of_torch_xla_around_a_function), "replay"),
    "GRU": (lambda: Recurrent(nn.GRU), "replay"),
    "LSTM": (lambda: Recurrent(nn.LSTM), "replay"),
    "RNN": (lambda: Recurrent(nn.RNN), "replay"),
    "packed LSTM": (lambda: Recurrent(nn.LSTM, packs=True), "traced"),  # the order comes back from the device
    "packed GRU": (lambda: Recurrent(nn.GRU, packs=True), "traced"),
    "BatchNorm in eval mode": (BehindALayer, "replay"),
    "abs of complex numbers": (Amplitude, "traced"),  # torch_xla makes complex numbers on the host
}


def model_fn(features, labels, mode, params, model, optimizer):
    loss = F.cross_entropy(model(features), labels)
    return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss), host_call=(
        lambda loss: LOSSES.append(loss.item()), [loss.reshape(1)]))


LOSSES: list[float] = []


def losses_of(capture, model, tmp_path, **arguments):
    LOSSES.clear()
    trainer = run(capture, model_fn, model, sgd, batches(rows), tmp_path, steps=20, **arguments)[2]
    return list(LOSSES), trainer


def plain_losses_of(model):
    """What plain PyTorch gives for the same model and batches."""
    model, losses = copy.deepcopy(model), []
    optimizer = sgd(model, {})
    for features, labels in itertools.islice(batches(rows)({}), 20):
        loss = F.cross_entropy(model(features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", MODULES)
def test_a_module_trains_as_plain_pytorch_does_and_is_captured(name, tmp_path):
    make, expected_kind = MODULES[name]
    torch.manual_seed(0)
    model = make()
    plain = plain_losses_of(model)
    traced = losses_of("off", model, tmp_path)[0]
    captured, trainer = losses_of("require" if expected_kind == "replay" else "auto", model, tmp_path)
    assert kind(trainer) == expected_kind
    assert captured == traced
    torch.testing.assert_close(torch.tensor(captured), torch.tensor(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("around", [reentrant, not_reentrant, of_torch_xla])
def test_dropout_drops_the_same_units_where_a_layer_is_computed_again(around, tmp_path):
    found = []
    for each in (without, around):
        torch.manual_seed(0)
        model = Checkpointed(each, drop=0.5)
        traced, captured = (losses_of(capture, model, tmp_path)[0] for capture in ("off", "require"))
        assert traced == captured
        found.append(traced)
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(found[0]), rtol=1e-5, atol=1e-6)


def test_the_process_keeps_torchs_own_gru_and_clipping():
    restore_torch()
    assert nn.GRU.__module__ == "torch.nn.modules.rnn"
    assert nn.utils.clip_grad_norm_.__module__ == "torch.nn.utils.clip_grad"
    host = nn.GRU(2, 3)
    host(torch.ones(1, 1, 2))[0].sum().backward()
    nn.utils.clip_grad_norm_(host.parameters(), 1.0, foreach=True)


@pytest.mark.parametrize("lengths", [[2, 3], [3, 0], [6, 1], [3]])
def test_lengths_that_do_not_fit_are_refused(lengths):
    register_formulas()
    with pytest.raises(RuntimeError, match="one length of 1 to 5 for each of 2 rows, the longest first.*got"):
        rnn.pack_padded_sequence(torch.ones(2, 5, 1, device="xla"), torch.tensor(lengths), batch_first=True)


@pytest.mark.parametrize(("what", "kind_of_error", "message"), [
    (lambda x: x[:, :0].amax(1), SpecUsageError, r"XLA cannot compute .* at test_torch_parts.py:\d+"),
    (lambda x: x @ torch.ones(5, 3, device=x.device), RuntimeError, "cannot matrix-multiply"),
])
def test_an_error_of_xla_names_line_and_module(what, kind_of_error, message, tmp_path):
    class Inner(nn.Module):
        def forward(self, x):
            return what(x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner = nn.Linear(4, 3), Inner()

        def forward(self, x):
            return self.inner(self.first(x))

    with pytest.raises(kind_of_error, match=message) as raised:
        losses_of("auto", Outer(), tmp_path)
    told = str(raised.value) + "".join(getattr(raised.value, "__notes__", []))
    assert "test_torch_parts.py:" in told
    assert "in module 'inner' (Inner)" in told


def test_a_second_trainer_of_another_precision_is_right(tmp_path):
    found = []
    for order in (("fp32", "bf16-mixed"), ("bf16-mixed", "fp32")):
        for precision in order:
            torch.manual_seed(0)
            found.append((precision, losses_of("require", nn.Linear(4, 3), tmp_path,
                                               config={"precision": precision})[0]))
    assert found[0] == found[3]
    assert found[1] == found[2]
    assert found[0][1] != found[1][1]


def test_what_is_to_be_computed_again_is_not_merged_with_the_first_time(tmp_path):
    flops = {}
    for around in (without, reentrant, not_reentrant):
        trainer = Trainer(model_fn, model=lambda params, around=around: Checkpointed(around), optimizer=sgd,
                          model_dir=tmp_path, train_batch_size=8, config=RunConfig(
                              show_progress=False, tpu_config=TPUConfig(num_shards=1)))
        (train,) = trainer.plan(lambda params: iter([(torch.ones(8, 4), torch.ones(8, dtype=torch.long))]),
                                topology="v5e:2x2").modes
        flops[around] = train.flops
    again = 2 * 8 * 4 * 8  # the product of the first layer, [8, 4] @ [4, 8]
    assert flops[reentrant] >= flops[without] + again
    assert flops[not_reentrant] >= flops[without] + again
