import pytest
import torch
from safetensors.torch import save

from tpuspec.checkpoint.tensors import DTYPE_NAMES, decode_tensors, encode_tensors
from tpuspec.errors import CheckpointError


def test_the_bytes_are_those_of_the_safetensors_library():
    tensors = {str(dtype): torch.ones(2, 3).to(dtype) for dtype in DTYPE_NAMES}
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(1.5), 'ü"\n': torch.ones(3, dtype=torch.bfloat16)}
    assert b"".join(encode_tensors(tensors)) == save(tensors)
    assert b"".join(encode_tensors({})) == save({})


def test_what_is_no_safetensors_file_is_refused():
    with pytest.raises(CheckpointError, match="The checkpoint file x is damaged: it is no safetensors file"):
        decode_tensors(b"PK\x03\x04 a pickle, say", "x")
