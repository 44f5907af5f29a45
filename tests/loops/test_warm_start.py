"""Warm start: what is loaded from which files, what the log says of it, and what is refused."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tpuspec import VocabInfo, WarmStartSettings
from tpuspec.errors import CheckpointError, ConfigError
from tpuspec.loops.warm_start import warm_start


class Net(nn.Module):
    def __init__(self, classes=3, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.norm, self.head = nn.Embedding(4, 2), nn.BatchNorm1d(2), nn.Linear(2, classes)
        self.norm.running_mean.add_(seed)

    def forward(self, x):
        return self.head(self.norm(self.embedding(x)))


OLD = Net(seed=7).state_dict()
PARAMETERS = [name for name, _ in Net().named_parameters()]


def write_index(folder, tensors):
    """Writes Hugging Face's form: two files and their index."""
    names = list(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({
        "metadata": {"total_size": 1}, "weight_map": {name: file for file, part in shards.items() for name in part}}))
    return folder


def write_nested(path, tensors):
    torch.save({"state_dict": tensors, "epoch": 3}, path)
    return path


def write_torch(path, tensors):
    torch.save(tensors, path)
    return path


def write_file(path, tensors):
    save_file(tensors, path)
    return path


FORMS = {
    "a safetensors file": lambda folder: write_file(folder / "x.safetensors", OLD),
    "an index's folder": lambda folder: write_index(folder, OLD),
    "an index": lambda folder: write_index(folder, OLD) / "model.safetensors.index.json",
    "a state dict": lambda folder: write_torch(folder / "x.pt", OLD),
    "a state dict beside others": lambda folder: write_nested(folder / "x.ckpt", OLD),
}


def start(module, path, *, tell=lambda text: None, **settings):
    return warm_start(module, WarmStartSettings(path, **settings), tell)


@pytest.mark.parametrize("form", FORMS)
def test_all_parameters_and_no_buffers_are_loaded_from(form, tmp_path):
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    done = start(net, FORMS[form](tmp_path))
    for name, value in net.state_dict().items():
        assert torch.equal(value, OLD[name] if name in PARAMETERS else before[name]), name
    assert list(done.loaded) == PARAMETERS and set(done.kept) == OLD.keys() - set(PARAMETERS)


def test_a_list_of_patterns_loads_buffers_too(tmp_path):
    net = Net()
    start(net, FORMS["a state dict"](tmp_path), vars_to_warm_start=["norm", "head"])
    assert torch.equal(net.norm.running_mean, OLD["norm.running_mean"])
    assert torch.equal(net.embedding.weight, Net().embedding.weight)


def test_values_are_cast_to_the_models_dtype(tmp_path):
    halves = {name: value.bfloat16() if value.is_floating_point() else value for name, value in OLD.items()}
    net = Net()
    start(net, write_file(tmp_path / "x.safetensors", halves))
    assert net.head.weight.dtype is torch.float32 and torch.equal(net.head.weight, halves["head.weight"].float())


def test_the_log_lists_what_was_loaded_and_what_was_not_and_why(tmp_path, caplog):
    told, tensors = [], {**OLD, "rotary.inv_freq": torch.ones(2)}
    del tensors["head.bias"]
    with caplog.at_level(logging.INFO):
        start(Net(), path := write_file(tmp_path / "x.safetensors", tensors), tell=told.append,
              vars_to_warm_start="(?!embedding)")
    assert told == [
        f"warm start from {path}: loaded 3 of 8 tensors\n"
        "  not loaded, left out by vars_to_warm_start: embedding.weight\n"
        "  not loaded, not in the checkpoint: head.bias\n"
        "  not loaded, a buffer, which only a list vars_to_warm_start=['.*'] takes: norm.running_mean, "
        "norm.running_var, norm.num_batches_tracked\n"
        "  not in the model: rotary.inv_freq"]
    assert "warm start: head.weight <- head.weight, [3, 2] torch.float32" in caplog.messages
    assert "warm start: head.bias keeps its initial value: not in the checkpoint" in caplog.messages


def test_names_are_mapped(tmp_path):
    net, path = Net(), write_file(tmp_path / "x.safetensors", {"wte": OLD["embedding.weight"]})
    done = start(net, path, var_name_to_prev_var_name={"embedding.weight": "wte"})
    assert torch.equal(net.embedding.weight, OLD["embedding.weight"]) and done.loaded == {"embedding.weight": "wte"}


def test_a_vocabulary_grows_at_its_end_or_by_its_tokens(tmp_path):
    (tmp_path / "old.txt").write_text("a\nb\nc\nd\n")
    path = FORMS["a state dict"](tmp_path)
    old, initial = OLD["embedding.weight"], torch.full((6, 2), 9.0)
    for info, expected in (
            (VocabInfo(), [0, 1, 2, 3, None, None]),
            (VocabInfo(new_vocab=["x", "c", "a", "y", "d", "z"], old_vocab=tmp_path / "old.txt"),
             [None, 2, 0, None, 3, None])):
        net = Net()
        net.embedding = nn.Embedding(6, 2, _weight=initial.clone())
        start(net, path, var_name_to_vocab_info={"embedding.weight": info})
        for row, place in enumerate(expected):
            assert torch.equal(net.embedding.weight[row], initial[0] if place is None else old[place])


def test_a_tensor_with_two_names_in_the_model_needs_one_in_the_checkpoint(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(4, 2), nn.Linear(2, 4, bias=False)
            self.head.weight = self.embedding.weight

    one, other = torch.ones(4, 2), torch.zeros(4, 2)
    net = Tied()
    done = start(net, write_file(tmp_path / "x.safetensors", {"embedding.weight": one}))
    assert torch.equal(net.head.weight, one) and not done.kept
    path = write_file(tmp_path / "y.safetensors", {"embedding.weight": other, "head.weight": one})
    with pytest.raises(CheckpointError, match="are one tensor in the model, and differ in the checkpoint"):
        start(net, path)
    assert torch.equal(net.head.weight, one)


def refused(tmp_path, error, match, path=None, module=None, **settings):
    net = module or Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(error, match=match):
        start(net, path or FORMS["a state dict"](tmp_path), **settings)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_shapes_and_kinds_that_differ_are_refused_unless_left_out(tmp_path):
    refused(tmp_path, CheckpointError, r"head.weight is \[5, 2\] in the model, \[3, 2\] in the checkpoint\n  head.bias",
            module=Net(classes=5))
    done = start(Net(classes=5), FORMS["a state dict"](tmp_path), vars_to_warm_start="(?!head)")
    assert list(done.loaded) == PARAMETERS[:3]
    integers = write_file(tmp_path / "q.safetensors", {**OLD, "head.weight": torch.ones(3, 2, dtype=torch.int8)})
    refused(tmp_path, CheckpointError, r"head.weight is torch.float32 in the model, torch.int8 in the checkpoint; only "
            "floats are cast", path=integers)
    net = Net()
    net.embedding = nn.Embedding(3, 2)
    refused(tmp_path, CheckpointError, r"embedding.weight has 3 rows in the model, fewer than the checkpoint's 4",
            module=net, var_name_to_vocab_info={"embedding.weight": VocabInfo()})
    refused(tmp_path, CheckpointError, "has 4 rows in the checkpoint, and its vocabulary 2 tokens",
            var_name_to_vocab_info={"embedding.weight": VocabInfo(new_vocab=list("abcd"), old_vocab=["a", "b"])})


def test_names_and_patterns_that_match_nothing_are_refused(tmp_path):
    refused(tmp_path, ConfigError, r"vars_to_warm_start='hed' matches no parameter of the model.*from the start",
            vars_to_warm_start="hed")
    refused(tmp_path, ConfigError, r"'norm.running_mean' matches no parameter", vars_to_warm_start="norm.running_mean")
    refused(tmp_path, ConfigError, r"var_name_to_prev_var_name names 'head.wieght'.*did you mean 'head.weight'",
            var_name_to_prev_var_name={"head.wieght": "x"})
    refused(tmp_path, CheckpointError, r"'head.weight'\] is 'haed.weight', which is not in .*did you mean 'head",
            var_name_to_prev_var_name={"head.weight": "haed.weight"})
    refused(tmp_path, ConfigError, "'head.weight' has a setting for its warm start, and is not loaded",
            vars_to_warm_start="norm", var_name_to_prev_var_name={"head.weight": "norm.weight"})
    other = write_file(tmp_path / "y.safetensors", {f"module.{name}": value for name, value in OLD.items()})
    refused(tmp_path, CheckpointError, r"no tensor of a name that is to be loaded: it has module\.", path=other)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.npz").write_bytes(b"1")
    (tmp_path / "cut.safetensors").write_bytes(write_file(tmp_path / "s.safetensors", OLD).read_bytes()[:-9])
    (tmp_path / "cut.pt").write_bytes(write_torch(tmp_path / "t.pt", OLD).read_bytes()[:-99])
    write_torch(tmp_path / "object.pt", {"model": Net()})
    write_torch(tmp_path / "number.pt", {"epoch": 3})
    (tmp_path / "index").mkdir()
    (write_index(tmp_path / "index", OLD) / "model-00002-of-00002.safetensors").unlink()
    (tmp_path / "bad.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/x"}}')
    for name, message in (
            ("nowhere", "does not exist"), ("empty", "has nothing to start from"), ("x.npz", "is of no known kind"),
            ("cut.safetensors", "is no safetensors file that can be read"), ("cut.pt", "is no file of torch.save"),
            ("object.pt", "holds other things than tensors"), ("number.pt", "holds no state dict"),
            ("index", "00002-of-00002.safetensors', which is not there"),
            ("bad.safetensors.index.json", "no file beside it")):
        refused(tmp_path, CheckpointError, message, path=tmp_path / name)
