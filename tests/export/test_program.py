"""Tracing: what can be a program, what cannot, and what the program is held to."""

from __future__ import annotations

import io
import itertools
import zipfile

import pytest
import torch
from torch import nn
from torch.func import functional_call

from tpuspec.errors import ExportError
from tpuspec.export.program import trace
from tpuspec.spec.export_output import ClassificationOutput, PredictOutput

X = torch.linspace(-1, 1, 6).reshape(3, 2)


def traced(function, weights=None, received=X, **arguments):
    """The program of a function (weights, received) -> tensors by name."""
    return trace(lambda weights, received: {"serving_default": PredictOutput(function(weights, received))},
                 weights or {}, received, **arguments)


def loaded(program):
    return torch.export.load(io.BytesIO(program.content)).module()


def test_a_program_takes_any_number_of_rows():
    program = traced(lambda weights, x: {"y": x @ weights["w"]}, {"w": torch.ones(2, 1)}, X[:1])
    for rows in (torch.ones(1, 2), torch.ones(1000, 2)):
        assert loaded(program)({"w": torch.ones(2, 1)}, rows)["serving_default"]["y"].tolist() == [[2]] * len(rows)


def test_weights_are_not_in_the_file_and_nothing_is_pickled():
    weights = {"w": torch.rand(1000, 2)}
    program = traced(lambda weights, x: {"y": x @ weights["w"].T + torch.tensor(2.0)}, weights)
    assert len(program.content) < weights["w"].nbytes
    with zipfile.ZipFile(io.BytesIO(program.content)) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    assert not any(content.startswith(b"\x80") or b"PK" in content[:2] for content in entries.values())
    assert any(b'"use_pickle": false' in content for content in entries.values())
    assert not any(b'"use_pickle": true' in content for content in entries.values())


def test_no_path_of_this_machine_is_in_the_file():
    assert __file__.rpartition("/")[0].encode() not in zipfile.ZipFile(io.BytesIO(
        traced(lambda weights, x: {"y": x.cos()}).content)).read("archive/models/model.json")


def test_shapes_say_where_the_rows_are():
    program = traced(lambda weights, x: {
        "same": x, "sums": x.sum(1), "all": x.sum(), "twice": torch.cat([x, x]), "big": x[x[:, 0] > 0]})
    assert {name: spec.shape for name, spec in program.signatures["serving_default"].outputs.items()} == {
        "same": ("batch", 2), "sums": ("batch",), "all": (), "twice": (None, 2), "big": (None, 2)}
    assert {name: str(spec) for name, spec in program.inputs.items()} == {"input": "float32 [batch, 2]"}


def test_kinds_and_names_are_those_of_the_outputs():
    program = trace(lambda weights, x: {"a": ClassificationOutput(scores=x), "b": PredictOutput(x)}, {}, X)
    assert {name: (signature.kind, list(signature.outputs)) for name, signature in program.signatures.items()} == {
        "a": ("classify", ["scores"]), "b": ("predict", ["output"])}


@pytest.mark.parametrize("mark", ['"', "'"])
def test_a_name_that_torch_cannot_write_into_code_is_refused(mark):
    says = r"(?s)names of modules and features .*quotation mark .*rename .*SyntaxError"
    with pytest.raises(ExportError, match=says):
        traced(lambda weights, x: {"y": x[f"a{mark}b"]}, received={f"a{mark}b": X})
    with pytest.raises(ExportError, match=says):
        traced(lambda weights, x: {"y": x @ weights[f"a{mark}b"]}, {f"a{mark}b": torch.ones(2, 1)})


def test_a_fixed_number_of_rows_is_refused_with_the_way_out_and_can_be_asked_for():
    def function(weights, x):
        return {"y": x.reshape(3, 2) if len(x) == 3 else x}

    with pytest.raises(ExportError, match=r"(?s)any number of rows.*fixed_batch=True"):
        traced(lambda weights, x: {"y": x.reshape(6, 2) * torch.ones(6, 1)} if len(x) == 6 else {"y": x})
    program = traced(function, fixed_batch=True)
    assert program.inputs["input"].shape == (3, 2)
    assert loaded(program)({}, X)["serving_default"]["y"].shape == (3, 2)


@pytest.mark.parametrize("function", [
    lambda weights, x: {"y": x if x.sum() > 0 else -x},
    lambda weights, x: {"y": x * float(x[0, 0])} if x[0, 0].item() > 2 else {"y": x},
    lambda weights, x: {"y": torch.as_tensor(x.numpy() * 2)},
], ids=["branch", "item", "numpy"])
def test_what_cannot_be_traced_is_refused_with_what_torch_says(function):
    with pytest.raises(ExportError, match=r"cannot be traced by torch.export. .*It says: ") as caught:
        traced(function)
    assert caught.value.__cause__ is not None


def test_an_error_of_the_function_is_its_own():
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        traced(lambda weights, x: {"y": x * (1 / 0)})


def test_a_function_that_depends_on_a_counter_is_refused():
    count = itertools.count(1)
    with pytest.raises(ExportError, match=r"gives another serving_default.y than model_fn, by up to .*counter"):
        traced(lambda weights, x: {"y": x * next(count)})


def test_an_integer_that_depends_on_a_counter_is_warned_of(caplog):
    count = itertools.count(1)
    traced(lambda weights, x: {"y": torch.full_like(x, next(count), dtype=torch.int64)})
    assert "gives another serving_default.y than model_fn for some rows" in caplog.text


def test_random_numbers_of_torch_are_drawn_anew_by_each_request():
    program = loaded(traced(lambda weights, x: {"y": torch.rand(x.shape[0])}))
    first, second = (program({}, X)["serving_default"]["y"] for _ in range(2))
    assert not torch.equal(first, second)


def test_a_buffer_that_the_function_changes_is_the_same_for_each_request():
    def function(weights, x):
        weights["count"].add_(1)
        return {"y": x * weights["count"]}

    weights = {"count": torch.ones(())}
    program = loaded(traced(function, weights))
    results = [program(weights, X)["serving_default"]["y"] for _ in range(2)]
    assert weights["count"] == 1
    assert torch.equal(results[0], X * 2) and torch.equal(results[1], X * 2)


@pytest.mark.parametrize(("module", "received"), [
    (nn.Sequential(nn.Conv1d(1, 3, 2), nn.BatchNorm1d(3), nn.ReLU(), nn.Dropout(0.5)), torch.rand(2, 1, 5)),
    (nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2), torch.rand(2, 5, 4)),
    (nn.Embedding(5, 3), torch.tensor([[1, 2], [3, 4]])),
], ids=["conv", "transformer", "embedding"])
def test_modules_of_torch_can_be_exported(module, received):
    module.eval()
    weights = {name: tensor.detach() for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    program = loaded(traced(lambda weights, x: {"y": functional_call(module, weights, (x,))}, weights, received))
    with torch.no_grad():
        served = program({name: weights[name] for name in sorted(weights)}, received)["serving_default"]["y"]
        torch.testing.assert_close(served, module(received))
