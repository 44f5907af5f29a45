"""Exports of real Trainers: which weights, in which precision, and what they leave as it was."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tpuspec
from tests.models import in_predict, input_fn, make_config, make_trainer, serving_input_fn
from tests.models import model_fn as regression
from tests.regression import batch_norm_net
from tpuspec import EvalSpec, LatestExporter, ModeKeys, Scaffold, TPUEstimatorSpec, TrainSpec
from tpuspec.errors import ConfigError, ConfigTypeError, ExportError
from tpuspec.export import load
from tpuspec.loops.export_folder import commit_next

X = torch.linspace(-1, 1, 4).reshape(4, 1)


def native(tmp_path, model_fn=regression, **arguments):
    return make_trainer(tmp_path / "run", model_fn, use_tpu=False, **arguments)


def predicted(trainer, **arguments):
    return np.stack([row["outputs"] for row in trainer.predict(lambda params: [X[:2], X[2:]], **arguments)])


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("bf16-mixed", torch.float32)])
def test_an_export_computes_in_the_precision_of_the_run_and_gives_float32(tmp_path, precision, dtype):
    trainer = native(tmp_path, config=make_config(precision=precision)).train(input_fn, max_steps=3)
    path = trainer.export(tmp_path / "out", serving_input_fn)
    served = load(path)(X)["outputs"]
    assert served.dtype == torch.float32
    assert torch.equal(served, torch.tensor(predicted(trainer)))
    assert {tensor.dtype for tensor in load_file(f"{path}/weights.safetensors").values()} == {dtype}


def test_a_checkpoint_or_the_newest_weights_are_exported(tmp_path):
    trainer = native(tmp_path, config=make_config(save_checkpoints_steps=1)).train(input_fn, max_steps=2)
    for arguments in ({}, {"checkpoint_path": tmp_path / "run" / "checkpoint-1"}):
        path = trainer.export(tmp_path / "out", serving_input_fn, **arguments)
        assert torch.equal(load(path)(X)["outputs"], torch.tensor(predicted(trainer, **arguments)))
    assert load(path).global_step == 1


def test_the_scaffolds_restore_and_ready_fn_are_asked(tmp_path):
    ready = []

    def restore(module, tensors):
        module.load_state_dict({name: torch.full_like(tensor, 2.0) for name, tensor in tensors.items()})

    def function(features, mode, params, model):
        return TPUEstimatorSpec(mode, predictions={"outputs": model(features)}, scaffold_fn=lambda: Scaffold(
            restore=restore, ready_fn=lambda module: ready[-1]))

    trainer = native(tmp_path, in_predict(function)).train(input_fn, max_steps=1)
    ready.append(None)
    assert load(trainer.export(tmp_path / "out", serving_input_fn))(torch.ones(1, 1))["outputs"].item() == 4
    ready.append("the vocabulary")
    with pytest.raises(ConfigError, match="not ready, says the scaffold's ready_fn: the vocabulary"):
        trainer.export(tmp_path / "out", serving_input_fn)


def test_batch_norm_serves_with_running_statistics_and_dropout_is_off(tmp_path):
    trainer = native(tmp_path, model=batch_norm_net).train(input_fn, max_steps=3)
    served = load(trainer.export(tmp_path / "out", serving_input_fn))
    assert torch.equal(served(X)["outputs"], served(X)["outputs"])
    torch.testing.assert_close(served(X)["outputs"], torch.tensor(predicted(trainer)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        self.b.weight = self.a.weight
        self.register_buffer("scale", torch.full((1,), 3.0), persistent=False)

    def forward(self, x):
        return self.b(self.a(x)) * self.scale


@pytest.mark.parametrize("model", [lambda params: Tied(), Tied()], ids=["function", "module"])
def test_tied_weights_are_stored_once_and_buffers_that_no_checkpoint_holds_too(tmp_path, model):
    trainer = native(tmp_path, model=model).train(input_fn, max_steps=1)
    path = trainer.export(tmp_path / "out", serving_input_fn)
    assert sorted(load_file(f"{path}/weights.safetensors")) == ["a.weight", "scale"]
    torch.testing.assert_close(load(path)(X)["outputs"], torch.tensor(predicted(trainer)))


def test_a_trainer_without_a_model_is_exported(tmp_path):
    def model_fn(features, labels, mode, params):
        if mode == ModeKeys.PREDICT:
            return TPUEstimatorSpec(mode, predictions={"outputs": features * params["factor"]})
        return TPUEstimatorSpec(mode, loss=features.sum(), train_op=lambda: None)

    trainer = native(tmp_path, model_fn, model=None, optimizer=None, params={"factor": 3.0})
    path = trainer.train(input_fn, max_steps=2).export(tmp_path / "out", serving_input_fn)
    served = load(path)
    assert served.global_step == 2 and load_file(f"{path}/weights.safetensors") == {}
    assert torch.equal(served(X)["outputs"], X * 3)


def test_a_modules_weights_for_a_trainer_without_a_model_are_refused(tmp_path):
    def model_fn(features, mode, params):
        return TPUEstimatorSpec(mode, predictions={"y": features * 2})

    native(tmp_path).train(input_fn, max_steps=1)
    with pytest.raises(ValueError, match="holds a module's tensors, but the Trainer has no model"):
        native(tmp_path, model_fn, model=None, optimizer=None).export(tmp_path / "out", serving_input_fn)


def train_with(tmp_path, name, exporters, use_tpu):
    torch.manual_seed(1)
    trainer = make_trainer(tmp_path / name, use_tpu=use_tpu, model=batch_norm_net,
                           config=make_config(save_checkpoints_steps=2))
    eval_spec = EvalSpec(input_fn, exporters=exporters, throttle_secs=0)
    tpuspec.train_and_evaluate(trainer, TrainSpec(input_fn, 6), eval_spec)
    return {key: trainer.get_variable_value(key) for key in trainer.get_variable_names()}, (
        random.random(), np.random.rand(), torch.rand(1).item())


@pytest.mark.parametrize("use_tpu", [True, False], ids=["xla", "native"])
def test_training_goes_on_as_if_nothing_had_been_exported(tmp_path, use_tpu):
    results = []
    for name, exporters in (("with", [LatestExporter("latest", serving_input_fn)]), ("without", [])):
        random.seed(1)
        np.random.seed(1)
        results.append(train_with(tmp_path, name, exporters, use_tpu))
    (values, drawn), (other_values, other_drawn) = results
    assert drawn == other_drawn
    assert all(np.array_equal(values[name], other_values[name]) for name in values)
    assert len(list((tmp_path / "with" / "export" / "latest").iterdir())) == 3


@pytest.mark.parametrize(("function", "kind", "says"), [
    (3, ConfigTypeError, "must be a function"),
    (lambda: torch.zeros(1, 1), ConfigTypeError, "must return a tpuspec.ServingInputReceiver; got Tensor"),
    (lambda features: None, ConfigError, r"may take params, and nothing else; it takes \['features'\]"),
])
def test_a_serving_input_fn_of_another_kind_is_refused(tmp_path, function, kind, says):
    trainer = native(tmp_path).train(input_fn, max_steps=1)
    with pytest.raises(kind, match=says):
        trainer.export(tmp_path / "out", function)


@pytest.mark.parametrize(("metrics", "kind", "says"), [
    ({"x": object()}, ConfigTypeError, r"metrics\['x'\] must be a number, a text, an array, .*; got object"),
    ({"x": {"y": [1j]}}, ConfigTypeError, r"metrics\['x'\]\['y'\] must be .*; got complex"),
    ({"x": "NaN"}, ConfigError, r"metrics\['x'\] must not be the text 'NaN'.* Give float\('NaN'\), or another text"),
    ({3: 4}, ConfigTypeError, "names in metrics must be str; got 3"),
    ([1], ConfigTypeError, r"metrics must be a dict, as evaluate\(\) returns it; got list"),
])
def test_metrics_that_an_export_cannot_keep_are_refused_before_model_fn_runs(tmp_path, metrics, kind, says):
    trainer = native(tmp_path).train(input_fn, max_steps=1)
    with pytest.raises(kind, match=says):
        trainer.export(tmp_path / "out", None, metrics=metrics)
    assert not (tmp_path / "out").exists()


def test_metrics_of_all_kinds_come_back(tmp_path):
    trainer = native(tmp_path).train(input_fn, max_steps=1)
    path = trainer.export(tmp_path / "out", serving_input_fn, metrics={
        "nan": np.float32("nan"), "high": [float("inf"), -float("inf")], "array": np.ones(2), "tensor": torch.tensor(3),
        "none": None, "yes": True, "text": "nan"})
    assert load(path).metrics == {"nan": pytest.approx(float("nan"), nan_ok=True), "array": [1, 1], "tensor": 3,
                                  "high": [float("inf"), -float("inf")], "none": None, "yes": True, "text": "nan"}


def test_where_no_name_is_left_for_an_export_it_is_refused_before_model_fn_runs(tmp_path):
    (tmp_path / "out" / "9999999999").mkdir(parents=True)
    trainer = native(tmp_path, in_predict(lambda *args: pytest.fail("model_fn ran"))).train(input_fn, max_steps=1)
    with pytest.raises(ConfigError, match=r"named by ten digits.*behind 9999999999 none is left.*Move that folder"):
        trainer.export(tmp_path / "out", serving_input_fn)
    with pytest.raises(ConfigError, match="none is left"):
        commit_next(tmp_path / "out", lambda folder: None)


def test_programs_with_other_signatures_are_refused(tmp_path):
    def function(features, mode, params, model):
        return TPUEstimatorSpec(mode, predictions={"tpu" if params["use_tpu"] else "cpu": model(features)})

    trainer = native(tmp_path, in_predict(function)).train(input_fn, max_steps=1)
    with pytest.raises(ExportError, match=r"must give the same export_outputs with params\['use_tpu'\] true and false"):
        trainer.export(tmp_path / "out", serving_input_fn)


def test_an_error_of_the_program_for_xla_says_so(tmp_path):
    def function(features, mode, params, model):
        if params["use_tpu"]:
            raise OSError("no such device")
        return TPUEstimatorSpec(mode, predictions={"y": model(features)})

    trainer = native(tmp_path, in_predict(function)).train(input_fn, max_steps=1)
    with pytest.raises(OSError, match="no such device") as caught:
        trainer.export(tmp_path / "out", serving_input_fn)
    assert "export_to_tpu=False leaves it out" in caught.value.__notes__[0]


def test_no_export_while_a_predict_generator_is_open(tmp_path):
    trainer = native(tmp_path).train(input_fn, max_steps=1)
    rows = trainer.predict(lambda params: [X])
    next(rows)
    with pytest.raises(ConfigError, match=r"export\(\) cannot go on while a predict\(\) generator is open"):
        trainer.export(tmp_path / "out", serving_input_fn)
    rows.close()
    assert trainer.export(tmp_path / "out", serving_input_fn)
