"""Loading and serving: what is refused, and that neither torch_xla nor the model's code is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models import input_fn, make_spec, make_trainer
from tpuspec import ModeKeys
from tpuspec.errors import ExportError, InputError
from tpuspec.export import ServingInputReceiver, load

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    trainer = make_trainer(folder / "run", use_tpu=False).train(input_fn, max_steps=1)
    return Path(trainer.export(folder / "out", lambda: ServingInputReceiver(
        lambda received: received["x"], {"x": torch.zeros(1, 1)})))


@pytest.fixture
def copied(exported, tmp_path):
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_arrays_are_served_as_tensors_are(exported):
    model = load(exported)
    rows = np.ones((2, 1), np.float32)
    assert torch.equal(model({"x": rows})["outputs"], model({"x": torch.ones(2, 1)})["outputs"])
    assert model.global_step == 1 and list(model.signatures) == ["serving_default"]


@pytest.mark.parametrize(("inputs", "says"), [
    (torch.ones(1, 1), r"takes x: float32 \[batch, 1\]; got \['input'\]"),
    ({"x": torch.ones(1, 1), "y": torch.ones(1, 1)}, r"got \['x', 'y'\]"),
    ({"x": np.ones((1, 1))}, r"'x' must be float32 \[batch, 1\]; got float64 \[1, 1\]. Cast it"),
    ({"x": torch.ones(1, 2)}, r"got float32 \[1, 2\]"),
    ({"x": torch.ones(1)}, r"got float32 \[1\]"),
])
def test_an_input_of_another_name_dtype_or_shape_is_refused(exported, inputs, says):
    with pytest.raises(InputError, match=says):
        load(exported)(inputs)


def test_an_unknown_signature_is_refused(exported):
    with pytest.raises(ExportError, match=r"no signature 'other'; it has \['serving_default'\]"):
        load(exported)({"x": torch.ones(1, 1)}, "other")


@pytest.mark.parametrize("name", ["weights.safetensors", "serve.pt2"])
def test_a_changed_byte_or_a_missing_file_is_named(copied, name):
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(ExportError, match=f"checksum mismatch in {name}"):
        load(copied)
    (copied / name).unlink()
    with pytest.raises(ExportError, match=f"{name} cannot be read"):
        load(copied)


def test_a_folder_that_is_no_export_or_a_later_one_is_refused(copied, tmp_path):
    with pytest.raises(ExportError, match="is no export: it has no export.json"):
        load(tmp_path / "nowhere")
    body = json.loads((copied / "export.json").read_text())
    (copied / "export.json").write_text(json.dumps(body | {"format_version": 2}))
    with pytest.raises(ExportError, match="has format 2, and this tpuspec reads 1"):
        load(copied)
    (copied / "export.json").write_text(json.dumps(body)[:-9])
    with pytest.raises(ExportError, match="export.json cannot be read: JSONDecodeError"):
        load(copied)
    body["inputs"]["x"]["dtype"] = "os"
    (copied / "export.json").write_text(json.dumps(body))
    with pytest.raises(ExportError, match="no tensor is os"):
        load(copied)


PLAIN = """
import sys
sys.modules["torch_xla"] = None
import tpuspec
first = tpuspec.export.load(sys.argv[1])({"x": tpuspec.export.serving.torch.ones(2, 1)})["outputs"]

import torch
from safetensors.torch import load_file
program = torch.export.load(sys.argv[1] + "/serve.pt2").module()
weights = dict(sorted(load_file(sys.argv[1] + "/weights.safetensors").items()))
second = program(weights, {"x": torch.ones(2, 1)})["serving_default"]["outputs"]
assert torch.equal(first, second)
assert not [name for name in sys.modules if name.startswith(("torch_xla.", "_XLAC"))]
print("served")
"""


def test_an_export_is_served_without_torch_xla_and_by_torch_alone(exported):
    done = subprocess.run([sys.executable, "-W", "error::DeprecationWarning", "-c", PLAIN, str(exported)], cwd=ROOT,
                          capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout == "served\n", done.stderr


def on_device(tmp_path, device):
    """Outputs there and on the CPU of a program with a constant and a tensor that it makes."""
    def model_fn(features, labels, mode, params, model, optimizer):
        outputs = model(features) + torch.tensor([3.0]) * torch.arange(features.shape[0]).unsqueeze(1)
        return make_spec(mode, outputs if mode == ModeKeys.PREDICT else model(features), labels, optimizer)

    trainer = make_trainer(tmp_path / "run", model_fn, use_tpu=False).train(input_fn, max_steps=1)
    path = trainer.export(tmp_path / "out", lambda: ServingInputReceiver(torch.zeros(1, 1)))
    rows = torch.linspace(-1, 1, 4).reshape(4, 1)
    there = load(path, tags={"serve", "tpu"}, device=device)(rows)["outputs"]
    torch.testing.assert_close(there.cpu(), load(path)(rows)["outputs"])
    return there


def test_xla_serves_the_program_with_the_tags_of_its_own(tmp_path):
    import torch_xla

    assert on_device(tmp_path, torch_xla.device()).device.type == "xla"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_serves_it(tmp_path):
    assert on_device(tmp_path, "cuda").device.type == "cuda"
