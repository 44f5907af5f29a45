"""Rows EXP-01 .. EXP-11 of the conformance list: exports. TRAIN and EVAL are not exported, so those halves are left."""

from __future__ import annotations

import json
import os

import pytest
import torch
from torch import nn

import tpuspec
from tests.models import in_predict, input_fn, make_config, make_trainer, serving_input_fn
from tests.models import model_fn as regression
from tpuspec import (
    ClassificationOutput,
    ModeKeys,
    PredictOutput,
    RegressionOutput,
    ServingInputReceiver,
    TPUEstimatorSpec,
)
from tpuspec.export import load
from tpuspec.export.signature import flatten_output, rebuild_output

CPU, TPU = {"serve"}, {"serve", "tpu"}


def identity(features, mode, params):
    return TPUEstimatorSpec(mode, predictions={"x": features})


def trained(tmp_path, **arguments):
    return make_trainer(tmp_path / "run", **arguments).train(input_fn, max_steps=1)


def same_variants(path, features):
    on_cpu, on_tpu = load(path), load(path, tags=TPU)
    for signature in on_cpu.signatures:
        a, b = on_cpu(features, signature), on_tpu(features, signature)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return on_cpu


@pytest.mark.parametrize("use_tpu", [True, False], ids=["xla", "native"])
def test_exp_01_an_export_holds_two_variants_with_one_set_of_weights_that_run(tmp_path, use_tpu):
    trainer = trained(tmp_path, use_tpu=use_tpu)
    path = trainer.export(tmp_path / "out", serving_input_fn)
    assert sorted(os.listdir(path)) == ["export.json", "serve.pt2", "serve_tpu.pt2", "weights.safetensors"]
    weight, bias = (trainer.get_variable_value(name) for name in ("weight", "bias"))
    features = torch.linspace(-1, 1, 5).reshape(5, 1)
    served = same_variants(path, features)(features)
    torch.testing.assert_close(served["outputs"], features @ torch.tensor(weight).T + torch.tensor(bias))


@pytest.mark.parametrize(("to_cpu", "to_tpu", "there", "missing"), [
    (False, True, TPU, CPU), (True, False, CPU, TPU)], ids=["tpu_only", "cpu_only"])
def test_exp_02_one_variant_alone(tmp_path, to_cpu, to_tpu, there, missing):
    path = trained(tmp_path, use_tpu=False, export_to_cpu=to_cpu, export_to_tpu=to_tpu).export(
        tmp_path / "out", serving_input_fn)
    assert load(path, tags=there)(torch.ones(3, 1))["outputs"].shape == (3, 1)
    with pytest.raises(RuntimeError, match=r"no program with tags .* was found"):
        load(path, tags=missing)


def test_exp_02_neither_variant_is_refused_by_export_not_by_the_constructor(tmp_path):
    trainer = make_trainer(tmp_path, use_tpu=False, export_to_cpu=False, export_to_tpu=False)
    with pytest.raises(ValueError, match="One of export_to_cpu and export_to_tpu must be true"):
        trainer.export(tmp_path / "out", serving_input_fn)
    assert not (tmp_path / "out").exists()


def test_exp_03_model_fn_runs_in_predict_without_batch_size_and_context(tmp_path):
    seen = []

    def model_fn(features, mode, params, model):
        seen.append((mode, sorted(params)))
        return TPUEstimatorSpec(mode, predictions={"x": features})

    trainer = trained(tmp_path, model_fn=in_predict(model_fn), params={"own": 1}, predict_batch_size=1)
    path = trainer.export(tmp_path / "out", serving_input_fn)
    assert set(map(str, seen)) == {str((ModeKeys.PREDICT, ["own", "use_tpu"]))}
    x = torch.tensor([[1.5], [-2.0], [0.25]])
    assert torch.equal(same_variants(path, x)(x)["x"], x)


def test_exp_04_use_tpu_in_params_is_true_for_the_variant_for_xla_only_and_labels_are_none(tmp_path):
    def model_fn(features, labels, mode, params, model, optimizer):
        if mode == ModeKeys.PREDICT:
            assert labels is None
            return TPUEstimatorSpec(mode, predictions={"x": features * (10 if params["use_tpu"] else 1)})
        return regression(features, labels, mode, params, model, optimizer)

    trainer = trained(tmp_path, model_fn=model_fn, use_tpu=False, params={"own": 1})
    path = trainer.export(tmp_path / "out", serving_input_fn)
    assert load(path)(torch.ones(2, 1))["x"].tolist() == [[1], [1]]
    assert load(path, tags=TPU)(torch.ones(2, 1))["x"].tolist() == [[10], [10]]
    assert trainer.params == {"own": 1}


A, B = torch.rand(2, 3), torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(("output", "tensors"), [
    (RegressionOutput(A), [A]),
    (PredictOutput({"b": B, "a": A}), [B, A]),
    (ClassificationOutput(classes=B), [None, B]),
    (ClassificationOutput(scores=A), [A, None]),
    (ClassificationOutput(scores=A, classes=B), [A, B]),
], ids=["regression", "predict", "classes_only", "scores_only", "scores_and_classes"])
def test_exp_05_outputs_are_flattened_and_rebuilt(output, tensors):
    assert [id(tensor) for tensor in flatten_output(output)] == [id(tensor) for tensor in tensors]
    again = rebuild_output(output, tensors)
    assert type(again) is type(output)
    assert vars(again).keys() == vars(output).keys() and [
        id(tensor) for tensor in flatten_output(again)] == [id(tensor) for tensor in tensors]
    if isinstance(output, PredictOutput):
        assert list(again.outputs) == ["b", "a"]


def test_exp_05_another_number_of_tensors_or_kind_of_output_is_refused():
    with pytest.raises(ValueError, match="RegressionOutput has 1 tensors; got 2"):
        rebuild_output(RegressionOutput(A), [A, A])
    with pytest.raises(ValueError, match="can be exported; got ExportOutput"):
        flatten_output(tpuspec.spec.export_output.ExportOutput())


def test_exp_06_a_plain_estimator_spec_is_exported_with_both_variants(tmp_path):
    def model_fn(features, labels, mode, params, model, optimizer):
        loss = model(features).square().mean()
        return tpuspec.EstimatorSpec(mode, predictions={"y": model(features)}, loss=loss,
                                     train_op=optimizer and tpuspec.CrossShardOptimizer(optimizer).minimize(loss))

    path = trained(tmp_path, model_fn=model_fn, use_tpu=False).export(tmp_path / "out", serving_input_fn)
    assert same_variants(path, torch.ones(2048, 1))(torch.ones(2048, 1))["y"].shape == (2048, 1)


def test_exp_07_a_missing_serving_input_fn_or_trained_model_is_refused(tmp_path):
    trainer = make_trainer(tmp_path / "run", use_tpu=False)
    with pytest.raises(ValueError, match=f"Couldn't find trained model at {tmp_path / 'run'}"):
        trainer.export(tmp_path / "out", serving_input_fn)
    trainer.train(input_fn, max_steps=1)
    with pytest.raises(ValueError, match=r"An input_receiver_fn must be defined"):
        trainer.export(tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_exp_07_weights_in_memory_are_exported_where_nothing_was_saved(tmp_path):
    trainer = make_trainer(tmp_path / "run", use_tpu=False, model=lambda params: constant(42.0),
                           config=make_config(save_checkpoints_steps=None, save_checkpoints_secs=None),
                           optimizer=lambda model, params: torch.optim.SGD(model.parameters(), lr=0.0))
    trainer.train(input_fn, max_steps=1)
    assert trainer.latest_checkpoint() is None
    path = trainer.export(tmp_path / "out", serving_input_fn)
    assert load(path)(torch.ones(1, 1))["outputs"].item() == 42


def constant(value):
    linear = nn.Linear(1, 1)
    nn.init.constant_(linear.weight, 0.0)
    nn.init.constant_(linear.bias, value)
    return linear


def test_exp_08_without_export_outputs_there_is_one_signature_and_a_bare_tensor_is_called_output(tmp_path):
    path = trained(tmp_path, use_tpu=False, model_fn=in_predict(
        lambda features, mode, params, model: TPUEstimatorSpec(mode, predictions=model(features)))).export(
            tmp_path / "out", serving_input_fn)
    model = load(path)
    assert {name: list(signature.outputs) for name, signature in model.signatures.items()} == {
        "serving_default": ["output"]}


def test_exp_08_an_export_is_a_folder_named_by_the_time_with_assets(tmp_path):
    (tmp_path / "words").write_text("a b")
    trainer = trained(tmp_path, use_tpu=False)
    first, second = (trainer.export(tmp_path / "out", serving_input_fn, assets_extra={
        "vocabulary/deep/words.txt": tmp_path / "words", "top": str(tmp_path / "words")}) for _ in range(2))
    assert sorted(os.listdir(tmp_path / "out")) == [os.path.basename(first), os.path.basename(second)]
    assert all(len(name) == 10 and name.isdigit() for name in os.listdir(tmp_path / "out"))
    extra = tmp_path / "out" / os.path.basename(second) / "assets.extra"
    assert [(extra / name).read_text() for name in ("vocabulary/deep/words.txt", "top")] == ["a b", "a b"]


def test_exp_09_a_weight_that_the_checkpoint_lacks_is_named_with_the_mode(tmp_path):
    trained(tmp_path, use_tpu=False)
    wider = make_trainer(tmp_path / "run", use_tpu=False,
                         model=lambda params: nn.ModuleDict({"layer": nn.Linear(1, 1), "more": nn.Linear(1, 1)}),
                         model_fn=in_predict(
                             lambda features, mode, params, model: TPUEstimatorSpec(
                                 mode, predictions={"y": model["more"](model["layer"](features))})))
    with pytest.raises(ValueError, match=r"(?s)Could not load all requested variables from checkpoint .*checkpoint-1 "
                                         r"for mode 'infer'.*missing in the checkpoint: layer.weight") as caught:
        wider.export(tmp_path / "out", serving_input_fn)
    assert isinstance(caught.value, tpuspec.errors.CheckpointError), "exit code 3"
    assert list((tmp_path / "out").glob("*")) == []


def test_exp_09_values_of_the_checkpoint_override_initial_ones(tmp_path):
    trained(tmp_path, use_tpu=False, model=lambda params: constant(3.0),
            optimizer=lambda model, params: torch.optim.SGD(model.parameters(), lr=0.0))
    path = make_trainer(tmp_path / "run", use_tpu=False, model=lambda params: constant(36.0)).export(
        tmp_path / "out", serving_input_fn)
    assert load(path)(torch.ones(1, 1))["outputs"].item() == 3


X = torch.ones(2, 1)


@pytest.mark.parametrize(("arguments", "says"), [
    ((None,), "features must be defined"),
    (({1.5: X},), "feature keys must be str or int; got 1.5"),
    (({"x": [1.0]},), "feature 'x' must be a Tensor"),
    (([X],), "feature must be a tensor or a dict"),
    (({},), "feature must be a tensor or a dict"),
    ((torch.tensor(1.0),), "feature 'feature' must have its rows on axis 0"),
    ((lambda received: X,), "features is a function of receiver_tensors, and there are none"),
    ((lambda received: X, {1: X}), "receiver_tensors keys must be str; got 1"),
    ((lambda received: X, torch.tensor(1.0)), "receiver_tensors 'input' must have its rows on axis 0"),
    ((X, {"x": X}), "features and receiver_tensors are both tensors"),
    (({"a": X, "b": torch.ones(3, 1)},), "same number of rows"),
    ((torch.ones(0, 1),), "at least one"),
])
def test_exp_10_a_receiver_of_something_else_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        ServingInputReceiver(*arguments)


def test_exp_10_a_single_receiver_is_called_input_and_features_may_be_computed(tmp_path):
    trainer = trained(tmp_path, use_tpu=False, model_fn=in_predict(
        lambda features, mode, params, model: TPUEstimatorSpec(mode, predictions={"y": features[7] + features["z"]})))
    path = trainer.export(tmp_path / "out", lambda params: ServingInputReceiver(
        lambda received: {7: received["a"].float() / 2, "z": received["b"]},
        {"a": torch.zeros(1, 2, dtype=torch.uint8), "b": torch.zeros(1, 2)}))
    model = load(path)
    assert {name: str(spec) for name, spec in model.inputs.items()} == {
        "a": "uint8 [batch, 2]", "b": "float32 [batch, 2]"}
    assert model({"a": torch.tensor([[4, 6]], dtype=torch.uint8), "b": torch.ones(1, 2)})["y"].tolist() == [[3, 4]]
    single = load(trainer.export(tmp_path / "out", lambda params: ServingInputReceiver(
        lambda received: {7: received, "z": received}, torch.zeros(1, 2))))
    assert list(single.inputs) == ["input"]
    assert single(torch.ones(3, 2))["y"].tolist() == single({"input": torch.ones(3, 2)})["y"].tolist() == [[2, 2]] * 3


def test_exp_11_there_is_one_way_to_export_and_no_version_of_it_to_choose(tmp_path):
    """V1, which wraps the whole model_fn: the variant for XLA is model_fn itself, and batching is the server's."""
    with pytest.raises(TypeError, match="export_saved_model_api_version"):
        make_trainer(tmp_path, export_saved_model_api_version=3)
    path = trained(tmp_path, use_tpu=False).export(tmp_path / "out", serving_input_fn)
    programs = json.loads((tmp_path / "out" / os.path.basename(path) / "export.json").read_text())["programs"]
    assert [program["tags"] for program in programs] == [["serve"], ["serve", "tpu"]]
