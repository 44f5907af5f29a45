"""SCAF: warm start by a Trainer, on XLA and without."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tpuspec
from tpuspec import CrossShardOptimizer, RunConfig, TPUEstimatorSpec, Trainer, VocabInfo, WarmStartSettings
from tpuspec.errors import CheckpointError, ConfigError
from tpuspec.spec.warm_start import check_warm_start, parse_warm_start


def model_fn(features, labels, mode, params, model, optimizer):
    if mode == tpuspec.ModeKeys.PREDICT:
        return TPUEstimatorSpec(mode, predictions={"y": model(features)})
    losses = model(features).square().mean(1)
    if mode == tpuspec.ModeKeys.EVAL:
        return TPUEstimatorSpec(mode, loss=losses)
    loss = losses.mean()
    return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss))


def input_fn(params):
    return iter([(torch.ones(8, 2), torch.ones(8))] * 9)


def make(folder, *, use_tpu, source=None, width=1):
    return Trainer(model_fn, model=lambda params: nn.Linear(2, width),
                   optimizer=lambda model, params: torch.optim.SGD(model.parameters(), lr=0.25), model_dir=folder,
                   train_batch_size=8, eval_batch_size=8, predict_batch_size=8, use_tpu=use_tpu, eval_on_tpu=use_tpu,
                   warm_start_from=source, config=RunConfig(seed=0, show_progress=False))


def value_of(trainer):
    return trainer.get_variable_value("weight")


@pytest.mark.parametrize("use_tpu", [True, False])
def test_scaf_06_a_trainer_starts_from_another_ones_weights_but_not_from_its_step(use_tpu, tmp_path):
    first = make(tmp_path / "first", use_tpu=use_tpu).train(input_fn, steps=3)
    expected = first.evaluate(input_fn)["loss"]
    second = make(tmp_path / "second", use_tpu=use_tpu, source=tmp_path / "first")
    result = second.evaluate(input_fn)  # without a checkpoint: the warm-started weights
    assert (result["loss"], result["global_step"]) == (expected, 0)
    (row, *_) = second.predict(input_fn)
    assert row["y"] ** 2 == pytest.approx(expected)
    second.train(input_fn, steps=2)
    first.train(input_fn, steps=2)
    assert second.global_step() == 2 and (value_of(second) == value_of(first)).all()


def test_scaf_07_a_checkpoint_in_model_dir_wins_over_a_warm_start(tmp_path):
    make(tmp_path / "first", use_tpu=False).train(input_fn, steps=3)
    make(tmp_path / "second", use_tpu=False).train(input_fn, steps=1)
    own = value_of(make(tmp_path / "second", use_tpu=False))
    # The source is not even looked at.
    third = make(tmp_path / "second", use_tpu=False, source=tmp_path / "nowhere")
    assert third.evaluate(input_fn)["global_step"] == 1 and (value_of(third) == own).all()
    with pytest.raises(CheckpointError, match="does not exist"):
        make(tmp_path / "third", use_tpu=False, source=tmp_path / "nowhere").train(input_fn, steps=1)
    with pytest.raises(CheckpointError, match=r"weight is \[5, 2\] in the model, \[1, 2\] in the checkpoint"):
        make(tmp_path / "third", use_tpu=False, source=tmp_path / "first", width=5).train(input_fn, steps=1)


def test_scaf_07_an_export_and_a_run_from_an_export_have_the_weights_of_a_warm_start(tmp_path):
    def receive(params):
        return tpuspec.ServingInputReceiver(lambda received: received["x"], {"x": torch.zeros(1, 2)})

    weights = {"weight": torch.tensor([[3.0, 4.0]]), "bias": torch.tensor([1.0])}
    path = tmp_path / "x.safetensors"
    save_file(weights, path)
    folder = make(tmp_path / "first", use_tpu=False, source=path).export(tmp_path / "export", receive)
    assert tpuspec.export.load(folder)({"x": torch.ones(1, 2)})["y"].item() == 8.0
    again = make(tmp_path / "second", use_tpu=False, source=folder)
    assert again.evaluate(input_fn)["loss"] == 64.0


def test_scaf_08_settings_that_make_no_sense_are_refused():
    for value in (3, ["x"], {}):
        with pytest.raises(ConfigError, match="`warm_start_from` must be a string or a WarmStartSettings"):
            check_warm_start(value)
    with pytest.raises(ConfigError, match="`ckpt_to_initialize_from` MUST be set"):
        WarmStartSettings("")
    with pytest.raises(ConfigError, match=r"'\(' is no regular expression"):
        WarmStartSettings("x", vars_to_warm_start="(")
    with pytest.raises(ConfigError, match="new_vocab and old_vocab, or neither"):
        VocabInfo(new_vocab=["a"])
    with pytest.raises(ConfigError, match="warm_start_from has no 'ckpt'"):
        parse_warm_start({"ckpt": "x"})
    with pytest.raises(ConfigError, match="warm_start_from needs ckpt_to_initialize_from"):
        parse_warm_start({"vars_to_warm_start": "x"})
    parsed = parse_warm_start({"ckpt_to_initialize_from": "x", "var_name_to_vocab_info": {"e": None}})
    assert parsed is not None and parsed.var_name_to_vocab_info == {"e": VocabInfo()}
