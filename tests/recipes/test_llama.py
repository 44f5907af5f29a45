"""The Llama recipe: its mathematics, its shapes, and what it reads of Hugging Face's config.json."""

from __future__ import annotations

import json
import math
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
import yaml

from tpuspec import ModeKeys
from tpuspec.recipes import llama

PARAMS = {
    "size": "tiny", "num_layers": 2, "width": 16, "num_heads": 4, "num_kv_heads": 2, "head_width": 6, "mlp_width": 20,
    "length": 8, "folder": None, "learning_rate": 0.01, "weight_decay": 0.1, "clip_grad_norm": 1.0, "num_samples": 2,
    "sample_bytes": 3, "temperature": 1.0, "eval_windows": 5}
LLAMA_32 = {
    "model_type": "llama", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99, "rms_norm_eps": 1e-6, "rope_theta": 500000.0,
    "max_position_embeddings": 131072, "tie_word_embeddings": True, "hidden_act": "silu", "attention_bias": False,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"}}


def make(**changes):
    torch.manual_seed(0)
    return llama.model(PARAMS | changes)


@pytest.mark.parametrize(("size", "vocabulary", "num_parameters"), [
    ("1b", 128256, 1_235_814_400), ("7b", 32000, 6_738_415_616), ("70b", 32000, 68_976_648_192)])
def test_a_size_has_as_many_parameters_as_its_llama_and_needs_no_memory(size, vocabulary, num_parameters):
    with torch.device("meta"):
        model = llama.model({"size": size, "vocabulary": vocabulary, "num_samples": 1})
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"meta"}


def test_weights_have_the_names_that_hugging_face_gives_them():
    layer = [f"model.layers.0.{name}.weight" for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
        "mlp.down_proj", "input_layernorm", "post_attention_layernorm")]
    names = ["model.embed_tokens.weight", *layer, "model.norm.weight"]
    assert list(make(num_layers=1).state_dict()) == names
    assert list(make(num_layers=1, tied_head=False).state_dict()) == [*names, "lm_head.weight"]


def test_no_position_sees_what_comes_after_it():
    model, x = make(), torch.randint(0, 256, (1, 8))
    changed = x.clone()
    changed[0, 5] += 1
    difference = (model(x) - model(changed)).abs().amax(dim=-1)[0]
    assert (difference[:5] == 0).all() and (difference[5:] > 0).all()


def test_scores_depend_on_the_distance_of_two_positions_and_heads_share_keys():
    model = make(num_layers=1)
    attention, shape = model.model.layers[0].self_attn, model.model.shape
    cosines, sines = llama.rotary_table(shape, 8, torch.device("cpu"))
    q, k = torch.randn(6), torch.randn(6)
    scores = llama.rotate(q.expand(1, 1, 8, 6), cosines, sines) @ llama.rotate(
        k.expand(1, 1, 8, 6), cosines, sines).transpose(2, 3)
    for distance in range(-7, 8):
        torch.testing.assert_close(*(scores[0, 0].diagonal(distance)[[0, -1]]))
    assert scores[0, 0, 0].unique().numel() == 8
    # With the keys and values of both heads equal, all of them mix alike where their queries are alike.
    with torch.no_grad():
        attention.q_proj.weight.copy_(attention.q_proj.weight[:6].repeat(4, 1))
        attention.o_proj.weight.copy_(torch.eye(16, 24))
        mixed = attention(torch.randn(1, 8, 16), cosines, sines)
    torch.testing.assert_close(mixed[..., :6], mixed[..., 6:12])
    assert not torch.allclose(mixed[..., 6:10], mixed[..., 12:16])


@pytest.mark.parametrize("tied_head", [True, False])
def test_rematerialization_changes_no_gradient(tied_head):
    gradients, x = [], torch.randint(0, 256, (2, 8))
    for remat in (False, True):
        model = make(remat=remat, tied_head=tied_head)
        model(x).logsumexp(-1).mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_the_shape_of_a_folder_is_that_of_its_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_32))
    shape = llama.shape_of({"size": str(tmp_path), "num_layers": 1, "length": None})
    assert shape == llama.Shape(
        vocabulary=99, width=24, num_layers=1, num_heads=4, num_kv_heads=2, head_width=8, mlp_width=40, length=2048,
        rope_theta=500000.0, norm_eps=1e-6, tied_head=True, remat=True, rope_scaling={
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192})
    for key, value, message in (
            ("hidden_act", "gelu", "has hidden_act='gelu'"), ("model_type", "qwen2", "has model_type='qwen2'"),
            ("rope_scaling", {"rope_type": "yarn"}, "rotary positions of type 'yarn'")):
        (tmp_path / "config.json").write_text(json.dumps(LLAMA_32 | {key: value}))
        with pytest.raises(ValueError, match=message):
            llama.shape_of({"size": str(tmp_path)})


def test_a_size_that_does_not_exist_or_fit_is_refused():
    with pytest.raises(ValueError, match=r"params.size must be tiny, 1b, 7b, 70b, or a folder .*got '7B'"):
        llama.shape_of({"size": "7B"})
    with pytest.raises(ValueError, match="must be a multiple of num_kv_heads"):
        llama.shape_of({"size": "tiny", "num_kv_heads": 3})


def test_long_wavelengths_are_stretched_as_in_llama_3():
    shape = llama.shape_of({"size": "1b", "rope_scaling": LLAMA_32["rope_scaling"], "head_width": 16})
    cosines, _ = llama.rotary_table(shape, 2, torch.device("cpu"))
    expected = []
    for i in range(8):
        frequency = 500000.0 ** (-i / 8)
        wavelength = 2 * math.pi / frequency
        if wavelength > 8192 / 1.0:
            frequency /= 32
        elif wavelength > 8192 / 4.0:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            frequency = (1 - smooth) * frequency / 32 + smooth * frequency
        expected.append(math.cos(frequency))
    torch.testing.assert_close(cosines[1], torch.tensor(expected * 2), rtol=1e-6, atol=1e-6)


def test_perplexity_is_that_of_the_mean_over_all_windows():
    losses = torch.tensor([0.5, 1.5, 4.0])
    perplexity, _ = llama.metric_fn(losses[:2], losses[:2])["perplexity"]
    perplexity.update(losses[:2])
    perplexity.update(losses[2:])
    assert perplexity.compute().item() == pytest.approx(math.exp(2.0), rel=1e-12)


def test_a_step_evaluates_and_samples():
    model = make().eval()
    x = torch.randint(0, 256, (6, 8))
    with torch.no_grad():
        spec = llama.model_fn(x, 255 - x, ModeKeys.EVAL, PARAMS, model, None, torch.tensor([0]))
        assert spec.loss.shape == (6,) and spec.loss.mean().item() == pytest.approx(math.log(256), abs=0.1)
        drawn = []
        for features in llama.input_fn(PARAMS | {"batch_size": 2}, ModeKeys.PREDICT):
            spec = llama.model_fn(features, None, ModeKeys.PREDICT, PARAMS, model, None, torch.tensor([0]))
            drawn.append(spec.predictions["byte"])
    assert model.window[0].tolist() == [*b"\ndef "] + [int(each[0]) for each in drawn]


@pytest.mark.parametrize("tied_head", [True, False])
def test_the_rules_of_a_mesh_split_each_matrix_once(tied_head):
    file = Path(llama.__file__).parent.parent / "configs" / "config" / "llama_mesh.yaml"
    assert yaml.safe_load(file.read_text())["tpu"]["sharding"] == llama.SHARDING
    for name, parameter in make(tied_head=tied_head).named_parameters():
        rules = [axes for pattern, axes in llama.SHARDING.items() if fnmatchcase(name, pattern)]
        assert len(rules) == (parameter.ndim == 2), name
    assert llama.SHARDING["*.o_proj.weight"] == llama.SHARDING["*.down_proj.weight"] == [None, "model"]
