import json
import pickle
import zlib

import pytest
import torch

from tests.checkpoints import rewrite_manifest
from tpuspec.checkpoint.manifest import NEEDS_TPUSPEC
from tpuspec.checkpoint.reader import is_complete
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


def test_fault_16_a_newer_format_names_the_version_it_needs_and_is_left_alone(checkpoint):
    file = rewrite_manifest(checkpoint, format_version=3, needs_tpuspec="7.1.0")
    before = file.read_bytes()
    with pytest.raises(CheckpointError, match=r"needs tpuspec >= 7.1.0: it has format 3, and this is tpuspec \d"):
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
    rewrite_manifest(checkpoint, files={name: {"size": 1, "crc32": 1}})
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
    rewrite_manifest(checkpoint, files=files)
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


@pytest.fixture
def sharded(tmp_path):
    state = TrainingState(global_step=1, model={name: torch.full((3,), float(i)) for i, name in enumerate("abc")},
                          optimizers={"": {"state": {0: {"m": torch.ones(2), "v": torch.ones(2)}}}})
    return CheckpointStore(tmp_path, max_shard_bytes=12).save(state)


def test_many_tensors_are_spread_over_shards_each_in_the_manifest(sharded):
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    names += ["optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors", "state.json"]
    assert sorted(path.name for path in sharded.iterdir()) == sorted([*names, "manifest.json"])
    files = json.loads((sharded / "manifest.json").read_text())["files"]
    assert {name: (entry["size"], entry["crc32"]) for name, entry in files.items()} == {
        name: (len(content := (sharded / name).read_bytes()), zlib.crc32(content)) for name in names}
    state = _load(sharded)
    assert {name: tensor.tolist() for name, tensor in state.model.items()} == {
        "a": [0.0] * 3, "b": [1.0] * 3, "c": [2.0] * 3}
    assert state.optimizers[""]["state"][0]["v"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "optimizer-00001-of-00002.safetensors"])
def test_fault_14_damage_to_a_shard_is_named(sharded, name):
    content = bytearray((sharded / name).read_bytes())
    content[-1] ^= 1
    (sharded / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"checksum mismatch in {name}"):
        _load(sharded)
    (sharded / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is damaged: it is missing"):
        _load(sharded)


def _files(sharded):
    return json.loads((sharded / "manifest.json").read_text())["files"]


def test_fault_20_a_manifest_without_one_of_the_shards_is_refused(sharded):
    for name in list(_files(sharded)):
        if name.startswith("model"):
            rewrite_manifest(sharded, files={other: entry for other, entry in _files(sharded).items() if other != name})
            with pytest.raises(CheckpointError, match=f"is no complete checkpoint: it has no {name}"):
                _load(sharded)
            rewrite_manifest(sharded, files=_files(sharded) | {name: {"size": 1, "crc32": 1}})


@pytest.mark.parametrize("name", ["../model-00001-of-00003.safetensors", "a/model.safetensors", "/etc/passwd"])
def test_fault_20_a_shard_elsewhere_is_refused(sharded, name):
    rewrite_manifest(sharded, files=_files(sharded) | {name: {"size": 1, "crc32": 1}})
    with pytest.raises(CheckpointError, match="names files outside its folder"):
        _load(sharded)


def test_fault_20_a_link_in_the_place_of_a_shard_is_refused(sharded):
    shard = sharded / "model-00002-of-00003.safetensors"
    shard.rename(sharded.parent / "elsewhere")
    shard.symlink_to(sharded.parent / "elsewhere")
    with pytest.raises(CheckpointError, match=f"{shard.name} is damaged: it cannot be read"):
        _load(sharded)


def test_fault_20_a_tensor_in_two_shards_is_refused(sharded):
    first, second = (sharded / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    second.write_bytes(first.read_bytes())
    rewrite_manifest(sharded, files=_files(sharded) | {second.name: _files(sharded)[first.name]})
    with pytest.raises(CheckpointError, match="has 'a' in two of its files"):
        _load(sharded)


def test_fault_20_counts_of_shards_that_no_memory_could_hold_take_none(sharded):
    state = _files(sharded)["state.json"]
    shard = {"size": 2**60, "crc32": 1}
    rewrite_manifest(sharded, files={"model-00001-of-99999.safetensors": shard, "state.json": state})
    with pytest.raises(CheckpointError, match="it has no model-00002-of-99999.safetensors"):
        _load(sharded)
