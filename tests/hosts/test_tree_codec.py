from __future__ import annotations

import json
import math
from collections import namedtuple
from typing import NamedTuple

import numpy as np
import pytest
import torch

from tpuspec.errors import SpecTypeError
from tpuspec.hosts.tree_codec import decode, encode, from_bytes, num_bytes, tensor_specs, to_bytes


class Pair(NamedTuple):
    left: torch.Tensor
    right: object


def travel(tree):
    """Through JSON and bytes, as between two hosts."""
    skeleton, tensors = encode(tree)
    skeleton = json.loads(json.dumps(skeleton))
    flat = to_bytes(tensors, torch.device("cpu"))
    specs = tensor_specs(skeleton)
    assert num_bytes(specs) == flat.numel()
    return decode(skeleton, from_bytes(flat, specs))


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 5), (2, 3)])
def test_tensors_of_every_dtype_and_shape_arrive_bit_for_bit(dtype, shape):
    tensor = torch.randint(0, 2, shape).to(dtype)
    first, second = travel([tensor, tensor.T if tensor.ndim == 2 else tensor])
    assert first.dtype == dtype
    assert torch.equal(first, tensor)
    assert torch.equal(second, tensor.T if tensor.ndim == 2 else tensor)


def test_nesting_keys_and_plain_values_arrive_as_they_were():
    tree = {"a": (1, [2.5, None, True, "x"], {3: "int key"}), "b": Pair(torch.ones(2), (math.inf, -math.inf))}
    found = travel(tree)
    assert found["a"] == tree["a"]
    assert isinstance(found["b"], Pair)
    assert torch.equal(found["b"].left, torch.ones(2))
    assert found["b"].right == (math.inf, -math.inf)
    assert math.isnan(travel(math.nan))


def test_arrays_stay_arrays_and_numpy_scalars_become_numbers():
    found = travel([np.arange(6.0).reshape(2, 3), np.float32(1.5), np.int64(3), np.array(2.0)])
    assert isinstance(found[0], np.ndarray)
    assert found[0].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert found[1:3] == [1.5, 3]
    assert found[3].shape == ()


@pytest.mark.parametrize(("leaf", "message"), [
    (object(), "a object cannot travel between hosts"), ({(1, 2): 3}, "keys of str or int travel")])
def test_what_cannot_travel_is_refused(leaf, message):
    with pytest.raises(SpecTypeError, match=message):
        encode([leaf])


def test_a_namedtuple_that_no_module_has_is_told():
    Local = namedtuple("Local", ["x"])
    with pytest.raises(SpecTypeError, match="Local cannot be found in module .*define it at the top of a module"):
        travel(Local(1))
