import json
import math
import tempfile
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tpuspec.checkpoint.state import TrainingState, pack, storable_tensors, unpack
from tpuspec.checkpoint.tensors import DTYPE_NAMES
from tpuspec.errors import CheckpointError

Pair = namedtuple("Pair", "a b")

_DTYPES = sorted(DTYPE_NAMES, key=str)
_SHAPES = [(), (0,), (3,), (2, 0, 3), (2, 3)]


def _tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    # Raw bits, NaN patterns included, save for bool, which has two.
    count = math.prod(shape)
    bits = torch.randint(0, 2 if dtype is torch.bool else 256, (count * dtype.itemsize,), dtype=torch.uint8)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return bits.view(dtype).reshape(shape)


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _through_files(tree: object) -> Any:
    skeleton, tensors = pack(tree)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tensors.safetensors")
        save_file(tensors, file)
        read = {name: tensor.clone() for name, tensor in load_file(file).items()}
    return unpack(json.loads(json.dumps(skeleton, allow_nan=False)), read)


def _assert_same(got: object, want: object) -> None:
    assert type(got) is type(want)
    if isinstance(want, torch.Tensor) and isinstance(got, torch.Tensor):
        assert (got.dtype, got.shape, _bits(got)) == (want.dtype, want.shape, _bits(want))
    elif isinstance(want, dict) and isinstance(got, dict):
        assert [(type(key), key) for key in got] == [(type(key), key) for key in want]
        for key in want:
            _assert_same(got[key], want[key])
    elif isinstance(want, list | tuple) and isinstance(got, list | tuple):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            _assert_same(one, other)
    elif isinstance(want, float):
        assert repr(got) == repr(want)
    else:
        assert got == want


_trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    | st.builds(_tensor, st.sampled_from(_DTYPES), st.sampled_from(_SHAPES)),
    lambda children: st.lists(children, max_size=4) | st.lists(children, max_size=4).map(tuple)
    | st.dictionaries(st.integers() | st.text(max_size=4), children, max_size=4),
    max_leaves=20)


@settings(deadline=None)  # writes files
@given(_trees)
def test_any_tree_comes_back_with_the_same_types_and_bits(tree):
    _assert_same(_through_files(tree), tree)


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize("shape", _SHAPES, ids=str)
def test_every_dtype_and_shape_keeps_its_bits(dtype, shape):
    tensor = _tensor(dtype, shape)
    _assert_same(_through_files({"x": tensor}), {"x": tensor})


def test_int_and_str_keys_that_look_alike_stay_apart():
    tree = {1: torch.tensor(1), "1": torch.tensor(2), "a.b": torch.tensor(3), "a": {"b": torch.tensor(4)}}
    _assert_same(_through_files(tree), tree)


def test_a_dict_that_looks_like_the_skeletons_own_marks_is_data():
    tree = {"tuple": [1], "x": {"tensor": "y"}, "z": {"float": "nan"}, "__metadata__": torch.tensor(1.)}
    _assert_same(_through_files(tree), tree)


def test_the_same_tensor_twice_is_stored_twice():
    tied = torch.arange(6.)
    tree = {"a": tied, "b": tied, "row": tied[2:4], "whole": tied}
    _, tensors = pack(tree)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == 4
    _assert_same(_through_files(tree), tree)


@pytest.mark.parametrize("view", [
    torch.arange(6.).reshape(2, 3).T,
    torch.arange(6.)[::2],
    torch.ones(1).expand(4),
    torch.arange(16.).reshape(1, 2, 2, 4).to(memory_format=torch.channels_last),
    torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex64).conj(),
    torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex64).conj().imag,
], ids=["transposed", "strided", "expanded", "channels_last", "conjugate", "negated"])
def test_views_are_stored_by_their_values(view):
    got = _through_files(view)
    assert torch.equal(got, view.clone())


def test_a_parameter_is_stored_as_a_plain_tensor_without_gradient():
    got = _through_files([torch.nn.Parameter(torch.ones(2))])[0]
    assert type(got) is torch.Tensor
    assert not got.requires_grad


def test_numpy_scalars_become_python_values():
    got = _through_files([np.float32(0.5), np.int64(3), np.bool_(True), np.float64("nan")])
    assert [type(value) for value in got] == [float, int, bool, float]
    assert got[:3] == [0.5, 3, True]


@pytest.mark.parametrize(("leaf", "kind"), [
    (object(), "builtins.object"),
    ({1}, "builtins.set"),
    (b"x", "builtins.bytes"),
    (1j, "builtins.complex"),
    (lambda: 1, "builtins.function"),
    (Pair(1, 2), "Pair"),
    (OrderedDict(a=1), "collections.OrderedDict"),
    (torch.float32, "torch.dtype"),
    (np.zeros(2), "numpy.ndarray"),
    (np.datetime64("2024-01-01"), "numpy.datetime64"),
])
def test_other_types_are_refused_with_their_place(leaf, kind):
    with pytest.raises(CheckpointError, match=rf"got .*{kind} at optimizers\['main'\]\['groups'\]\[1\]"):
        pack({"main": {"groups": [0, leaf]}}, "optimizers")


@pytest.mark.parametrize("key", [None, True, 1.5, (1, 2)], ids=str)
def test_other_keys_are_refused_with_their_place(key):
    with pytest.raises(CheckpointError, match=r"keys of a dict .* must be int or str; got .* in tree\['a'\]"):
        pack({"a": {key: 1}})


def test_a_list_that_holds_itself_is_refused():
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(CheckpointError, match=r"nested 64 deep.*Does it hold itself"):
        pack(loop)


@pytest.mark.parametrize(("tensor", "why"), [
    (torch.empty(2, device="meta"), "must be on the host .*'w' is on meta"),
    (torch.eye(2).to_sparse(), r"must be dense .*'w' is torch.sparse_coo. Use to_dense"),
    (torch.ones(2, dtype=torch.complex128), "'w' has dtype torch.complex128, which a checkpoint cannot hold"),
], ids=["meta", "sparse", "complex128"])
def test_tensors_that_cannot_be_stored_are_named(tensor, why):
    with pytest.raises(CheckpointError, match=why):
        storable_tensors({"w": tensor}, "model")


def test_a_model_tensor_with_the_reserved_name_is_refused():
    with pytest.raises(CheckpointError, match="cannot be named '__metadata__'"):
        storable_tensors({"__metadata__": torch.ones(1)}, "model")


@pytest.mark.parametrize(("skeleton", "why"), [
    ({"tensor": "x"}, "tensor 'x' is missing"),
    ({"float": "1e5"}, "unknown entry"),
    ({"tuple": 3}, "unknown entry"),
    ({"dict": [[1]]}, "unknown entry"),
    ({"dict": [[None, 1]]}, "a dict has the key None"),
    ({"pickle": "gASVAAAA"}, "unknown entry"),
    ({}, "unknown entry"),
])
def test_a_malformed_skeleton_is_damage(skeleton, why):
    with pytest.raises(CheckpointError, match=f"damaged: .*{why}"):
        unpack(skeleton, {})


def test_extra_state_of_a_module_is_refused_with_its_name():
    with pytest.raises(CheckpointError, match=r"state dict has dict at 'head._extra_state'. Keep it in a buffer"):
        TrainingState(global_step=1, model={"head._extra_state": {"a": 1}})  # type: ignore[dict-item]


@pytest.mark.parametrize("step", [-1, 1.0, True, None], ids=str)
def test_global_step_must_be_a_count(step):
    with pytest.raises(CheckpointError, match="global_step of a checkpoint must be an int >= 0; got"):
        TrainingState(global_step=step)
