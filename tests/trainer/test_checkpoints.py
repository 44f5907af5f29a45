"""What a later run goes on from: checkpoints, scaffolds, optimizer state."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import tpuspec
from tests.regression import (
    make_trainer,
    regression_fn,
    regression_rows,
    rows_input,
)
from tpuspec import ModeKeys, TPUEstimatorSpec
from tpuspec.errors import ConfigError


def test_training_goes_on_from_the_checkpoint_in_a_new_trainer(tmp_path):
    assert make_trainer(tmp_path).train(rows_input(), steps=5).global_step() == 5
    later = make_trainer(tmp_path)
    later.train(rows_input(), steps=5)
    assert later.global_step() == 10
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-0", "checkpoint-10", "checkpoint-5"]
    assert later.latest_checkpoint() == str(tmp_path / "checkpoint-10")
    assert later.get_variable_names() == ["bias", "global_step", "weight"]
    assert later.get_variable_value("global_step") == 10


def test_resumed_optimizer_state_is_that_of_an_uninterrupted_run(tmp_path):
    x, y = regression_rows(4).tensors

    def same_batch(params):
        return [(x, y)] * 6

    whole = make_trainer(tmp_path / "whole").train(same_batch, max_steps=6)
    make_trainer(tmp_path / "parts").train(same_batch, max_steps=3)
    parts = make_trainer(tmp_path / "parts").train(same_batch, max_steps=6)
    for name in ("weight", "bias"):
        np.testing.assert_array_equal(whole.get_variable_value(name), parts.get_variable_value(name))


def test_checkpoints_are_saved_at_start_at_their_distance_and_at_the_end(tmp_path):
    saves = []

    class Listener(tpuspec.CheckpointSaverListener):
        def after_save(self, global_step):
            saves.append(global_step)

    make_trainer(tmp_path, save_checkpoints_steps=10).train(
        rows_input(), max_steps=26, saving_listeners=[Listener()])
    assert saves == [0, 10, 20, 26]


def test_listener_that_returns_true_stops_training(tmp_path):
    class Listener(tpuspec.CheckpointSaverListener):
        def after_save(self, global_step):
            return global_step == 4

    trainer = make_trainer(tmp_path, save_checkpoints_steps=4)
    trainer.train(rows_input(), max_steps=20, saving_listeners=[Listener()])
    assert trainer.global_step() == 4


def test_scaffold_is_made_once_and_its_parts_are_used(tmp_path):
    made = []

    def scaffold_fn():
        made.append("made")
        return tpuspec.Scaffold(init_fn=lambda module: nn.init.constant_(module.weight, 42.0),
                                ready_fn=lambda module: made.append("ready"))

    def model_fn(features, labels, mode, params, model, optimizer):
        spec = regression_fn(features, labels, mode, params, model, optimizer, torch.zeros(1))
        if mode == ModeKeys.TRAIN:
            spec = spec.replace(train_op=lambda: None)
        return spec.replace(scaffold_fn=scaffold_fn)

    for use_tpu in (True, False):
        made.clear()
        trainer = make_trainer(tmp_path / str(use_tpu), model_fn, use_tpu=use_tpu)
        trainer.train(rows_input(), max_steps=4)
        assert trainer.get_variable_value("weight") == 42.0
        trainer.evaluate(rows_input())
        list(trainer.predict(rows_input()))
        assert made == ["made", "ready"] * 3


def test_tied_weights_stay_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    def model_fn(features, mode, params, model, optimizer):
        loss = model(features).square().mean()
        return TPUEstimatorSpec(mode, loss=loss, train_op=optimizer)

    trainer = make_trainer(tmp_path, model_fn, model=lambda params: Tied())
    trainer.train(lambda params: [torch.ones(4, 3)] * 6, max_steps=6)
    module = trainer._sessions[True].module
    assert module.a.weight is module.b.weight
    np.testing.assert_array_equal(trainer.get_variable_value("a.weight"), trainer.get_variable_value("b.weight"))


def test_a_training_in_parts_reads_the_dataset_on(tmp_path):
    seen = {}

    def model_fn(features, labels, mode, params, model, optimizer):
        spec = regression_fn(features, labels, mode, params, model, optimizer, torch.zeros(1))
        name = params["name"]
        return spec.replace(host_call=(lambda x: seen.setdefault(name, []).append(x.squeeze(1).tolist()), [features]))

    whole = make_trainer(tmp_path / "whole", model_fn, params={"name": "whole"})
    whole.train(rows_input(18), steps=9)
    for steps in (3, 1, 5):
        make_trainer(tmp_path / "parts", model_fn, params={"name": "parts"}).train(rows_input(18), steps=steps)
    assert seen["parts"] == seen["whole"]
    assert seen["whole"][:4] != seen["whole"][4:8], "each epoch has its own order"


def test_hyper_parameters_of_a_resumed_run_are_those_it_asks_for_and_a_difference_is_told(tmp_path, caplog):
    def with_lr(lr):
        return make_trainer(tmp_path, optimizer=lambda module, params: torch.optim.SGD(
            module.parameters(), lr=lr, momentum=0.9))

    with_lr(0.1).train(rows_input(), max_steps=2)
    before = with_lr(0.1).get_variable_value("weight")
    with_lr(0.0).train(rows_input(), max_steps=4)
    np.testing.assert_array_equal(with_lr(0.0).get_variable_value("weight"), before)
    assert "lr is 0.0 as this run asks; the checkpoint had 0.1" in caplog.text


def test_after_a_train_that_saved_nothing_the_variables_are_those_in_memory(tmp_path):
    trainer = make_trainer(tmp_path, save_checkpoints_secs=None)
    trainer.train(rows_input(), steps=3)
    assert trainer.latest_checkpoint() is None
    assert trainer.get_variable_names() == ["bias", "global_step", "weight"]
    assert trainer.get_variable_value("global_step") == 3
    before = trainer.get_variable_value("weight")
    trainer.train(rows_input(), steps=1)
    assert (trainer.get_variable_value("weight") != before).any()
    with pytest.raises(ConfigError, match="no variable 'x' in the model in memory; it holds"):
        trainer.get_variable_value("x")
    with pytest.raises(ConfigError, match="Could not find trained model in model_dir"):
        make_trainer(tmp_path).get_variable_names()
