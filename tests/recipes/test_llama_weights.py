"""A folder of Hugging Face's form, warm-started into the Llama recipe, gives Hugging Face's logits."""

from __future__ import annotations

import json

import pytest
import torch
import torch_xla  # noqa: F401 - transformers would import it, which sets an environment variable
from safetensors.torch import save_file

from tests.recipes.test_llama import LLAMA_32
from tpuspec import RunConfig, TPUEstimatorSpec, Trainer
from tpuspec.recipes import llama
from tpuspec.train import main

# With long wavelengths that the 40 positions can tell from unstretched ones.
CONFIG = LLAMA_32 | {"rope_theta": 100.0, "tie_word_embeddings": False, "rope_scaling": LLAMA_32["rope_scaling"] | {
    "original_max_position_embeddings": 64}}
TOKENS = torch.arange(2 * 40).reshape(2, 40) * 37 % 99
# Of transformers 5.24 with the weights of `weights`: logits of the last position of the first row, every eleventh.
GOLDEN = [0.33261, -0.34484, 0.34921, -0.34562, 0.33415, -0.31506, 0.28879, -0.25593, 0.21724]


def weights():
    """Returns weights that are the same on every machine, by Hugging Face's names."""
    with torch.device("meta"):
        shapes = llama.Llama(llama._shape_of_config(CONFIG, ""), 1).state_dict()
    return {name: (torch.arange(value.numel(), dtype=torch.float64) * (place + 2)).sin().mul(
        0.5).add(value.ndim == 1).float().reshape(value.shape) for place, (name, value) in enumerate(shapes.items())}


def write_folder(folder, tensors):
    """Writes config.json, an index and a file for each block."""
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        part = name.split(".")[2] if "layers" in name else "3"
        files.setdefault(f"model-0000{int(part) + 1}-of-00004.safetensors", {})[name] = value
    for file, part in files.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({
        "metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def logits_of(folder, model_dir):
    """Returns the recipe's logits of TOKENS, after a warm start from a folder."""
    def model_fn(features, labels, mode, params, model):
        return TPUEstimatorSpec(mode, predictions={"logits": model(features)})

    trainer = Trainer(model_fn, model=llama.model, model_dir=model_dir,
                      params={"size": str(folder), "length": 40, "num_samples": 1}, use_tpu=False, predict_batch_size=2,
                      warm_start_from=folder, config=RunConfig(show_progress=False))
    return torch.stack([torch.as_tensor(row["logits"]) for row in trainer.predict(lambda params: iter([TOKENS]))])


def test_a_sharded_folder_gives_the_logits_that_transformers_gave(tmp_path):
    logits = logits_of(write_folder(tmp_path, weights()), tmp_path / "run")
    torch.testing.assert_close(logits[0, -1, ::11], torch.tensor(GOLDEN), rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_of_transformers_gives_its_logits(tied, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**CONFIG, "tie_word_embeddings": tied, "initializer_range": 0.3})
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    with torch.no_grad():
        expected = theirs(TOKENS).logits
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    torch.testing.assert_close(logits_of(tmp_path / "hf", tmp_path / "run"), expected, rtol=0, atol=1e-4)
    if not tied:
        theirs.load_state_dict(weights())
        with torch.no_grad():
            assert theirs(TOKENS).logits[0, -1, ::11].tolist() == pytest.approx(GOLDEN, abs=1e-4)


def test_the_command_line_trains_from_a_folder(tmp_path, capsys):
    folder = write_folder(tmp_path, weights())
    argv = ["config=llama", "device=cpu", f"model_dir={tmp_path / 'run'}", "mode=train", "run.max_steps=1",
            "train_batch_size=2", f"params.size={folder}", "params.length=8", "params.sample_bytes=1"]
    grown = (f"warm_start_from={{ckpt_to_initialize_from: '{folder}', var_name_to_vocab_info: "
             "{model.embed_tokens.weight: {}, lm_head.weight: {}}}")
    # The bytes of the text need more tokens than the folder has.
    assert main([*argv, "params.vocabulary=256", f"warm_start_from={folder}"]) == 3
    assert "model.embed_tokens.weight is [256, 24] in the model, [99, 24] in the checkpoint" in capsys.readouterr().err
    assert main([*argv, "params.vocabulary=256", grown]) == 0
    assert "loaded 30 of 30 tensors" in capsys.readouterr().out
    assert main(["config=llama", "mode=plan", "plan.topology=v5e:2x2", f"warm_start_from={folder}"]) == 2
    assert "warm_start_from has no effect with mode=plan" in capsys.readouterr().err
