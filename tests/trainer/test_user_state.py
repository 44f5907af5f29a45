"""The state that user code makes is the state that is trained, shown and resumed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tpuspec import CrossShardOptimizer, RunConfig, SessionRunHook, TPUConfig, TPUEstimatorSpec, Trainer
from tpuspec.data.workers import start_iterator
from tpuspec.errors import CheckpointError, ConfigError, InputError

BATCH = 4


def model_fn(features, labels, mode, params, model, optimizer):
    loss = F.mse_loss(model(features), labels)
    return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss))


def input_fn(params):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(BATCH, 4, generator=generator), torch.randn(BATCH, 4, generator=generator))
            for _ in range(60)]


def sgd(model, params):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def make(model, tmp_path, optimizer=sgd, **arguments):
    return Trainer(model_fn, model=model, optimizer=optimizer, params={}, model_dir=tmp_path, train_batch_size=BATCH,
                   config=RunConfig(seed=0, show_progress=False, tpu_config=TPUConfig(iterations_per_loop=5)),
                   **arguments)


def with_frozen_norm(params):
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[0].eval()
    return model


@pytest.mark.parametrize("use_tpu", [True, False])
def test_a_part_that_the_model_function_put_into_eval_mode_stays_there(use_tpu, tmp_path):
    trainer = make(with_frozen_norm, tmp_path, use_tpu=use_tpu)
    trainer.train(input_fn, steps=12)
    state = trainer._sessions[use_tpu].model_state()
    assert state["0.num_batches_tracked"] == 0
    assert torch.equal(state["0.running_mean"], torch.zeros(4))
    assert state["2.num_batches_tracked"] == 12


def test_a_module_that_is_wholly_in_eval_mode_is_trained(tmp_path):
    trainer = make(lambda params: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)).eval(), tmp_path)
    trainer.train(input_fn, steps=5)
    assert trainer._sessions[True].model_state()["0.num_batches_tracked"] == 5


class Seen(SessionRunHook):
    def begin(self, context):
        self.step, self.weight = context.step, context.model.weight.detach().cpu().clone()


def test_a_hook_sees_at_begin_what_it_will_train_from(tmp_path):
    first = make(lambda params: nn.Linear(4, 4), tmp_path)
    first.train(input_fn, steps=7)
    seen = Seen()
    make(lambda params: nn.Linear(4, 4), tmp_path).train(input_fn, steps=3, hooks=[seen])
    assert seen.step == 7
    assert torch.equal(seen.weight, first._sessions[True].model_state()["weight"])


class Lower(SessionRunHook):
    """Sets the rate at step 10, as a user of a plateau would."""

    def __init__(self, groups):
        self._groups = groups

    def after_run(self, context):
        if context.step == 10:
            self._groups()[0]["lr"] = 0.01


@pytest.mark.parametrize("use_tpu", [True, False])
def test_a_rate_that_a_hook_changed_survives_a_resume_unless_the_run_asks_for_another(use_tpu, tmp_path, caplog):
    def train(steps, rate=0.1, folder=tmp_path / "parts"):
        trainer = make(lambda params: nn.Linear(4, 4), folder, use_tpu=use_tpu,
                       optimizer=lambda model, params: torch.optim.SGD(model.parameters(), lr=rate))
        groups = lambda: trainer._sessions[use_tpu].replicas[0].optimizers[""].param_groups  # noqa: E731
        trainer.train(input_fn, max_steps=steps, hooks=[Lower(groups)])
        return groups()[0]["lr"], trainer._sessions[use_tpu].model_state()

    train(15)
    rate, resumed = train(30)
    assert rate == 0.01
    assert "lr is" not in caplog.text
    rate, whole = train(30, folder=tmp_path / "whole")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    rate, _ = train(35, rate=0.2)
    assert rate == 0.2
    assert "lr is 0.2 as this run asks; the checkpoint had 0.01" in caplog.text


class Shared(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        if how == "a transposed .data":
            self.b.weight.data = self.a.weight.data.t()
        elif how == "a view":
            self.b.weight = nn.Parameter(self.a.weight.view(4, 4))
        elif how == "a slice":
            self.b.weight = nn.Parameter(self.a.weight.detach()[:2])
        elif how == "a buffer that is a slice":
            self.register_buffer("part", self.a.weight.detach()[1])
        elif how == "parts of one vector":
            vector = torch.randn(32)
            self.a.weight.data, self.b.weight.data = vector[:16].view(4, 4), vector[16:].view(4, 4)

    def forward(self, x):
        return self.b(self.a(x))


@pytest.mark.parametrize("how", ["a transposed .data", "a view", "a slice", "a buffer that is a slice"])
def test_tensors_that_share_memory_are_refused_by_name(how, tmp_path):
    trainer = make(lambda params: Shared(how), tmp_path)
    with pytest.raises(ConfigError, match=r"a\.weight and (b\.weight|part) of the model share memory"):
        trainer.train(input_fn, steps=1)


@pytest.mark.parametrize("how", ["nothing", "parts of one vector"])
def test_tensors_that_only_lie_side_by_side_are_trained(how, tmp_path):
    make(lambda params: Shared(how), tmp_path).train(input_fn, steps=3)


class Unfreeze(SessionRunHook):
    """Unfreezes the first layer once, after ten steps, with a rate of its own."""

    def after_run(self, context):
        if context.step == 10:
            layer = context.model[0].requires_grad_(True)
            MADE[-1].add_param_group({"params": list(layer.parameters()), "lr": 0.02})


MADE: list[torch.optim.Optimizer] = []


def frozen_at_first(params):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    return model


def last_layer(model, params):
    MADE.append(torch.optim.SGD(model[1].parameters(), lr=0.1, momentum=0.9))
    return MADE[-1]


@pytest.mark.parametrize("use_tpu", [True, False])
def test_a_group_that_a_hook_added_survives_a_resume(use_tpu, tmp_path):
    whole = make(frozen_at_first, tmp_path / "whole", optimizer=last_layer, use_tpu=use_tpu)
    whole.train(input_fn, max_steps=30, hooks=[Unfreeze()])
    for steps in (20, 30):
        trainer = make(frozen_at_first, tmp_path / "parts", optimizer=last_layer, use_tpu=use_tpu)
        trainer.train(input_fn, max_steps=steps, hooks=[Unfreeze()])
    groups = trainer._sessions[use_tpu].replicas[0].optimizers[""].param_groups
    assert [group["lr"] for group in groups] == [0.1, 0.02]
    for name, value in whole._sessions[use_tpu].model_state().items():
        assert torch.equal(value, trainer._sessions[use_tpu].model_state()[name]), name
    fewer = make(lambda params: nn.Sequential(nn.Identity(), nn.Linear(4, 4)), tmp_path / "parts",
                 optimizer=last_layer, use_tpu=use_tpu)
    with pytest.raises(CheckpointError, match="Restoring from checkpoint failed"):
        fewer.train(input_fn, max_steps=40)


def test_hooks_and_attributes_of_parameters_move_with_them(tmp_path):
    def build(params):
        torch.manual_seed(0)
        model = nn.Linear(4, 4)
        model.weight.decays = False
        model.weight.register_hook(lambda gradient: gradient * 0)
        return model

    def optimizer(model, params):
        assert model.weight.decays is False
        return sgd(model, params)

    trainer = make(build, tmp_path, optimizer)
    trainer.train(input_fn, steps=5)
    state = trainer._sessions[True].model_state()
    assert torch.equal(state["weight"], build(None).weight.detach())
    assert not torch.equal(state["bias"], build(None).bias.detach())


class Rows(IterableDataset):
    def __init__(self, shares):
        self.shares = shares

    def __iter__(self):
        info = get_worker_info() if self.shares else None
        for row in range(0 if info is None else info.id, 64, 1 if info is None else info.num_workers):
            yield torch.full((4,), float(row)), torch.zeros(4)


class RandomRows(Rows):
    def __iter__(self):
        for _ in range(64):
            yield torch.rand(4), torch.zeros(4)


def seed(worker):
    torch.manual_seed(worker)


def share(worker):
    get_worker_info().dataset.shares = True


@pytest.mark.parametrize(("dataset", "init"), [
    (Rows(True), None), (Rows(True), seed), (Rows(False), share), (RandomRows(False), seed)])
def test_workers_that_take_a_share_of_the_rows_or_draw_their_own_serve(dataset, init):
    batches = start_iterator(DataLoader(dataset, batch_size=4, num_workers=2, worker_init_fn=init))
    rows = [tuple(row.tolist()) for features, _ in batches for row in features]
    assert len(rows) == len(set(rows)) == (128 if isinstance(dataset, RandomRows) else 64)


@pytest.mark.parametrize("init", [None, seed, lambda worker: None])
def test_workers_that_would_all_read_every_row_are_told_of(init, tmp_path):
    def loader(params):
        return DataLoader(Rows(False), batch_size=BATCH, num_workers=2, worker_init_fn=init)

    trainer = make(lambda params: nn.Linear(4, 4), tmp_path, use_tpu=False)
    with pytest.raises(InputError, match="each of 2 DataLoader workers reads all rows of Rows"):
        trainer.train(loader, steps=3)


class Counting(torch.optim.SGD):
    """Keeps a count of its own beside those of the parameters."""

    def step(self, closure=None):
        self.state["count"] = self.state.get("count", 0) + 1
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["count"] = self.state["count"]
        return super().step(closure)


def test_a_number_in_an_optimizers_state_survives_a_resume(tmp_path):
    for steps in (5, 10):
        trainer = make(lambda params: nn.Linear(4, 4), tmp_path, use_tpu=False,
                       optimizer=lambda model, params: Counting(model.parameters(), lr=0.1))
        trainer.train(input_fn, max_steps=steps)
    state = trainer._sessions[False].replicas[0].optimizers[""].state
    assert state["count"] == 10 and {values["count"] for key, values in state.items() if key != "count"} == {10}
