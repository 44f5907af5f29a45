import contextlib
import io
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from tpuspec.checkpoint.tensors import DTYPE_NAMES, encode_tensors, read_tensors, split_shards


def test_the_bytes_are_those_of_the_safetensors_library():
    tensors = {str(dtype): torch.ones(2, 3).to(dtype) for dtype in DTYPE_NAMES}
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(1.5), 'ü"\n': torch.ones(3, dtype=torch.bfloat16)}
    assert b"".join(encode_tensors(tensors)) == save(tensors)
    assert b"".join(encode_tensors({})) == save({})


def decode(content: bytes) -> dict[str, torch.Tensor]:
    file = io.BytesIO(content)

    def fill(buffer):
        assert file.readinto(buffer) == len(buffer), "no more is asked for than there is"

    tensors = read_tensors(fill, len(content))
    assert not file.read(), "all was read"
    return tensors


def test_what_is_no_safetensors_file_is_refused():
    with pytest.raises(ValueError, match="its header claims"):
        decode(b"PK\x03\x04 a pickle, say")


def test_what_the_library_has_written_is_read_each_into_its_own_memory():
    tensors = {str(dtype): torch.ones(2, 3).to(dtype) for dtype in DTYPE_NAMES}
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(1.5), "odd": torch.ones(3, dtype=torch.int8)}
    got = decode(save(tensors, metadata={"format": "pt"}))
    assert got.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape
        assert torch.equal(got[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    assert len({tensor.untyped_storage().data_ptr() for tensor in got.values() if tensor.numel()}) == len(got) - 1


def test_bytes_that_stand_for_a_struct_are_aligned_for_it():
    tensors = {"a": torch.zeros(3, dtype=torch.uint8), "b": torch.get_rng_state()}
    got = decode(save(tensors))
    assert got["b"].data_ptr() % 16 == 0
    torch.set_rng_state(got["b"])


def test_tensors_that_are_not_aligned_are_read():
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    content = len(header).to_bytes(8, "little") + header + torch.tensor([1.5]).numpy().tobytes()
    assert len(header) % 4
    assert decode(content)["w"].tolist() == [1.5]


HOSTILE = {
    "an overlap": [("a", "F32", [1], [0, 4]), ("b", "F32", [1], [2, 6])],
    "a gap": [("a", "F32", [1], [2, 6])],
    "outside": [("a", "F32", [2**40], [0, 2**42])],
    "before the start": [("a", "F32", [1], [-4, 0])],
    "another shape": [("a", "F32", [3], [0, 4])],
    "a negative size": [("a", "F32", [-1, -1], [0, 4])],
    "a float size": [("a", "F32", [1.0], [0, 4])],
    "an unknown dtype": [("a", "F33", [1], [0, 4])],
    "backwards": [("a", "F32", [1], [4, 0])],
    "huge and empty": [("a", "F32", [2**62, 2**62], [0, 4])],
    "less than the file": [("a", "F32", [1], [0, 4])],
    "a text": [("a", "F32", "1", [0, 4])],
    "one offset": [("a", "F32", [1], [0])],
}


@pytest.mark.parametrize("entries", HOSTILE.values(), ids=HOSTILE)
def test_fault_20_a_hostile_header_is_refused(entries):
    header = json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}
                         for name, dtype, shape, offsets in entries}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(8)
    with pytest.raises(ValueError, match="bytes|header"):
        decode(content)


@pytest.mark.parametrize("header", [b"[]", b"{}x", b'{"a": 1}', b"[" * 100_000, b"\xff", b'{"a": {}}'])
def test_fault_20_a_header_that_is_none_is_refused(header):
    with pytest.raises(ValueError, match="header|Expecting|Extra|utf-8"):
        decode(len(header).to_bytes(8, "little") + header)


@given(content=st.binary(max_size=200))
def test_fault_20_any_bytes_are_read_or_refused(content):
    with contextlib.suppress(ValueError):
        decode(content)


@given(sizes=st.lists(st.integers(0, 30), max_size=20), max_bytes=st.integers(1, 100))
def test_shards_hold_all_tensors_in_order_within_their_bound(sizes, max_bytes):
    tensors = {str(i): torch.zeros(size, dtype=torch.uint8) for i, size in enumerate(sizes)}
    shards = split_shards(tensors, max_bytes)
    assert [name for shard in shards for name in shard] == list(tensors)
    assert all(len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= max_bytes for shard in shards) or not tensors
    assert len(shards) == 1 or all(shards)
