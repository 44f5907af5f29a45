import json
import pickle
import zlib

import pytest
import torch

from tpuspec.checkpoint.format import is_complete
from tpuspec.checkpoint.manifest import NEEDS_TPUSPEC, _seal
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
    with pytest.raises(CheckpointError, match=f"{name} is damaged: it is missing"):
        _load(checkpoint)


_ALL = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("name", _ALL)
def test_fault_14_a_flipped_bit_is_found_anywhere(checkpoint, name):
    file = checkpoint / name
    content = file.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        with pytest.raises(CheckpointError, match=f"{name} is damaged: (checksum mismatch|it is not valid JSON)"):
            _load(checkpoint)
    file.write_bytes(content)
    assert _load(checkpoint).model["w"].tolist() == [1.0] * 3


@pytest.mark.parametrize("name", _ALL)
def test_fault_14_a_truncation_at_any_byte_is_found(checkpoint, name):
    file = checkpoint / name
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=f"{name} is damaged: .*Restore an earlier checkpoint"):
            _load(checkpoint)
    file.write_bytes(content)
    assert _load(checkpoint).model["w"].tolist() == [1.0] * 3


def _rewrite(checkpoint, **changes):
    """Writes another manifest with a right checksum."""
    file = checkpoint / "manifest.json"
    body = json.loads(file.read_text())
    del body["crc32"]
    file.write_bytes(_seal(body | changes))
    return file


def test_fault_16_a_newer_format_names_the_version_it_needs_and_is_left_alone(checkpoint):
    file = _rewrite(checkpoint, format_version=2, needs_tpuspec="7.1.0")
    before = file.read_bytes()
    with pytest.raises(CheckpointError, match=r"needs tpuspec >= 7.1.0: it has format 2, and this is tpuspec \d"):
        _load(checkpoint)
    with pytest.raises(CheckpointError, match=r"needs tpuspec >= 7.1.0"):
        CheckpointStore(checkpoint.parent).latest()
    assert file.read_bytes() == before


def test_the_manifest_says_what_it_needs(checkpoint):
    values = json.loads((checkpoint / "manifest.json").read_text())
    assert (values["format_version"], values["needs_tpuspec"], values["global_step"]) == (1, NEEDS_TPUSPEC, 1)
    assert values["tpuspec_version"]


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a\0b", "-x", ""])
def test_fault_20_a_manifest_that_names_files_elsewhere_is_refused(checkpoint, name):
    _rewrite(checkpoint, files={name: {"size": 1, "crc32": 1}})
    with pytest.raises(CheckpointError, match="names files outside its folder"):
        _load(checkpoint)


@pytest.mark.parametrize("name", _ALL)
def test_fault_20_a_link_in_the_place_of_a_file_is_refused(checkpoint, name):
    (checkpoint / name).rename(checkpoint.parent / "elsewhere")
    (checkpoint / name).symlink_to(checkpoint.parent / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{name} is damaged: it cannot be read"):
        _load(checkpoint)


def test_fault_20_a_hostile_header_takes_no_memory(checkpoint):
    file = checkpoint / "model.safetensors"
    content = (2**62).to_bytes(8, "little") + file.read_bytes()[8:]
    file.write_bytes(content)
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    files[file.name] = {"size": len(content), "crc32": zlib.crc32(content)}
    _rewrite(checkpoint, files=files)
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged: it is no safetensors file"):
        _load(checkpoint)


class _Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize("name", _ALL)
@pytest.mark.parametrize("dump", [pickle.dump, torch.save])
def test_fault_19_a_pickle_under_any_name_is_refused_and_not_run(checkpoint, name, dump):
    with (checkpoint / name).open("wb") as file:
        dump(_Bomb(), file)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        _load(checkpoint)


def test_a_link_to_a_checkpoint_is_not_listed_as_one(checkpoint):
    link = checkpoint.parent / "checkpoint-2"
    link.symlink_to(checkpoint)
    assert not is_complete(link)
