import json
import pickle

import pytest
import torch

from tpuspec.checkpoint.format import NEEDS_TPUSPEC, is_complete, read_tensors, read_values, write_files
from tpuspec.checkpoint.state import TrainingState
from tpuspec.checkpoint.store import CheckpointStore
from tpuspec.errors import CheckpointError


@pytest.fixture
def checkpoint(tmp_path):
    return CheckpointStore(tmp_path).save(TrainingState(global_step=1, model={"w": torch.ones(3)}))


def _load(path):
    return CheckpointStore("elsewhere").load(path)


@pytest.mark.parametrize("name", ["missing", "empty", "foreign"])
def test_a_path_that_is_no_checkpoint_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "weights.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"{name}' is no checkpoint: it .*Give the path of a folder"):
        _load(tmp_path / name)


def test_a_file_in_the_place_of_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"file' is no checkpoint that can be read: .*Not a directory"):
        _load(tmp_path / "file")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_missing_file_is_named(checkpoint, name):
    (checkpoint / name).unlink()
    assert not is_complete(checkpoint)
    with pytest.raises(CheckpointError, match=f"checkpoint-1' is no complete checkpoint: it has no {name}"):
        _load(checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_truncation_at_any_byte_is_found(checkpoint, name):
    file = checkpoint / name
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=f"{name} is damaged: .*Restore an earlier checkpoint"):
            _load(checkpoint)
    file.write_bytes(content)
    assert _load(checkpoint).model["w"].tolist() == [1.0] * 3


@pytest.mark.parametrize(("text", "why"), [
    ("{]", "is damaged: it is not valid JSON"),
    ("\x80\x81", "is damaged: it is not valid JSON"),
    ("[" * 100_000, "is damaged: it is not valid JSON"),
    ("[]", "is no checkpoint of tpuspec: its state.json has no format_version"),
    ('{"model_type": "bert"}', "is no checkpoint of tpuspec"),
    ('{"format_version": 1}', "is damaged: global_step is missing or of a wrong type"),
])
def test_a_broken_or_foreign_state_file_is_refused(checkpoint, text, why):
    (checkpoint / "state.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=why):
        read_values(checkpoint)


def test_a_newer_format_names_the_version_it_needs_and_is_left_alone(checkpoint):
    file = checkpoint / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 2, "needs_tpuspec": "7.1.0"}))
    before = file.read_bytes()
    with pytest.raises(CheckpointError, match=r"needs tpuspec >= 7.1.0: it has format 2, and this is tpuspec \d"):
        _load(checkpoint)
    assert file.read_bytes() == before


def test_the_state_file_says_what_it_needs(checkpoint):
    values = json.loads((checkpoint / "state.json").read_text())
    assert (values["format_version"], values["needs_tpuspec"], values["global_step"]) == (1, NEEDS_TPUSPEC, 1)
    assert values["tpuspec_version"]


class _Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
@pytest.mark.parametrize("dump", [pickle.dump, torch.save])
def test_a_pickle_under_any_name_is_refused_and_not_run(checkpoint, name, dump):
    with (checkpoint / name).open("wb") as file:
        dump(_Bomb(), file)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        _load(checkpoint)


def test_a_link_to_a_checkpoint_is_not_listed_as_one(checkpoint):
    link = checkpoint.parent / "checkpoint-2"
    link.symlink_to(checkpoint)
    assert not is_complete(link)


def test_values_that_json_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        write_files(tmp_path, {"saved_at_seconds": float("nan")}, {}, {})


def test_read_tensors_gives_memory_of_its_own(checkpoint):
    tensors = read_tensors(checkpoint / "model.safetensors")
    tensors["w"].zero_()
    assert read_tensors(checkpoint / "model.safetensors")["w"].tolist() == [1.0] * 3
