from collections import UserDict
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest
import torch

from tpuspec.data.structure import BatchChecker, count_rows, split_labels, to_host_batch
from tpuspec.errors import InputError, InputTypeError
from tpuspec.spec.results import Batch


class Image(NamedTuple):
    pixels: torch.Tensor
    size: torch.Tensor


def checker(batch_size: int = 4, *, exact: bool = False) -> BatchChecker:
    return BatchChecker(batch_size=batch_size, exact=exact)


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize("pair", [("x", "y"), ["x", "y"]])
def test_a_pair_is_features_and_labels(pair):
    assert split_labels(pair) == ("x", "y")


@pytest.mark.parametrize("features", [
    ["x"], ["x", "y", "z"], {"a": "x"}, Image(ones(1), ones(1)), [], ones(2, 2)])
def test_any_other_list_a_dict_a_namedtuple_or_a_tensor_is_features(features):
    assert split_labels(features)[0] is features
    assert split_labels(features)[1] is None


@pytest.mark.parametrize("length", [0, 1, 3])
def test_sig_10_a_tuple_of_another_length_is_an_error(length):
    with pytest.raises(InputError, match=rf"\(features, labels\) as a len 2 tuple; got a tuple of {length}"):
        to_host_batch((ones(2),) * length)


def test_sig_11_nested_dicts_tuples_and_namedtuples_keep_their_types():
    features = {"images": Image(ones(2, 3), ones(2)), "pair": (ones(2), [ones(2, 1)])}
    batch = to_host_batch((features, {"y": (ones(2), ones(2))}))
    assert isinstance(batch.features["images"], Image)
    assert isinstance(batch.features["pair"], tuple)
    assert isinstance(batch.features["pair"][1], list)
    assert batch.features["images"].pixels.shape == (2, 3)
    assert isinstance(batch.labels["y"], tuple)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "int32", "int8", "uint8", "bool"])
def test_numpy_arrays_become_tensors_of_the_same_dtype_and_values(dtype):
    array = np.array([[0, 1], [1, 1]], dtype)
    tensor = to_host_batch(array).features
    assert str(tensor.dtype) == f"torch.{dtype}"
    assert tensor.numpy().tolist() == array.tolist()


def test_read_only_and_strided_arrays_are_copied():
    frozen = np.arange(4.0)
    frozen.flags.writeable = False
    reversed_rows = np.arange(6.0).reshape(3, 2)[::-1]
    batch = to_host_batch((frozen, reversed_rows))
    batch.features[0] = 7.0
    assert frozen[0] == 0.0
    assert batch.labels.tolist() == reversed_rows.tolist()


def test_a_tensor_with_a_gradient_history_is_detached():
    assert not to_host_batch(ones(2).requires_grad_() * 2).features.requires_grad


@pytest.mark.parametrize("array", [np.array(["a", "b"]), np.array([{}, {}], object), np.array([b"a"]),
                                   np.array(["2020-01-01"], "datetime64[D]")])
def test_arrays_of_strings_objects_and_dates_are_refused_by_name(array):
    with pytest.raises(InputTypeError, match=r"features\['words'\] must be an array of numbers or booleans; got dtype"):
        to_host_batch({"words": array})


@pytest.mark.parametrize(("leaf", "kind"), [("text", "str"), (1.5, "float"), ({1}, "set")])
def test_a_leaf_that_is_no_tensor_is_refused_by_name_and_kind(leaf, kind):
    with pytest.raises(InputTypeError, match=rf"labels\['y'\]\[1\] must be a tensor or an array .*got {kind}"):
        to_host_batch((ones(2), {"y": (ones(2), leaf)}))


def test_a_sparse_tensor_is_refused():
    with pytest.raises(InputTypeError, match=r"features must be a dense tensor; got torch.sparse_coo"):
        to_host_batch(ones(2, 2).to_sparse())


@pytest.mark.parametrize("features", [{}, [], {"a": ()}])
def test_features_without_any_tensor_are_refused(features):
    with pytest.raises(InputError, match="input_fn yielded features without any tensor"):
        to_host_batch(features)


@pytest.mark.parametrize("scalar", [torch.tensor(1.0), np.array(1.0)])
def test_a_scalar_is_refused_by_name(scalar):
    with pytest.raises(InputError, match=r"features\['s'\] must be batch-major, \[batch, ...\]; got a scalar"):
        checker().check(to_host_batch({"x": ones(4, 2), "s": scalar}))


def test_features_and_labels_of_different_rows_are_refused_by_name():
    with pytest.raises(InputError, match=r"labels\['y'\] must be batch-major with the rows of features\['x'\], 4; got "
                                         r"shape \[3, 2\]"):
        checker().check(Batch(features={"x": ones(4)}, labels={"y": ones(3, 2)}))


def test_rows_are_counted_on_axis_0():
    assert count_rows(Batch(features=(ones(3, 5), ones(3)), labels=ones(3, 7, 7))) == 3


@pytest.mark.parametrize(("first", "second", "message"), [
    ({"a": ones(4)}, {"b": ones(4)}, r"missing: \[\"features\['a'\]\"\], new: \[\"features\['b'\]\"\]"),
    ({"a": ones(4)}, {"a": ones(4), "b": ones(4)}, r"missing: \[\], new: \[\"features\['b'\]\"\]"),
    ({"a": ones(4, 2)}, {"a": ones(4, 3)}, r"features\['a'\] changed from \[batch, 2\] to \[batch, 3\]"),
    ({"a": ones(4, 2)}, {"a": ones(4, 2, dtype=torch.int32)},
     r"features\['a'\] changed from torch.float32 to torch.int32"),
    ([ones(4)], (ones(4),), r"the nesting.* changed from .*list.* to .*tuple"),
    (Image(ones(4), ones(4, 2)), Image(ones(4), ones(4, 5)), r"size changed from \[batch, 2\] to \[batch, 5\]"),
], ids=["key", "new key", "shape", "dtype", "nesting", "namedtuple"])
def test_a_changed_structure_names_the_key_and_the_old_and_the_new(first, second, message):
    held = checker()
    held.check(Batch(features=first))
    with pytest.raises(InputError, match="structure, shapes and dtypes of the first one.*" + message):
        held.check(Batch(features=second))


def test_labels_that_come_or_go_are_a_change():
    held = checker()
    held.check(Batch(features=ones(4)))
    with pytest.raises(InputError, match=r"new: \['labels'\]"):
        held.check(Batch(features=ones(4), labels=ones(4)))


def test_equal_batches_pass_and_their_rows_are_returned():
    held = checker()
    assert [held.check(Batch(features={"a": ones(rows, 2)})) for rows in (4, 4, 3)] == [4, 4, 3]


@pytest.mark.parametrize("second", [4, 2, 1])
def test_pred_08_only_the_last_batch_may_be_short(second):
    held = checker()
    held.check(Batch(features=ones(3)))
    with pytest.raises(InputError, match=rf"only the last batch may be short of batch_size, 4; a batch of {second} "
                                         "rows followed one of 3"):
        held.check(Batch(features=ones(second)))


@pytest.mark.parametrize("exact", [True, False])
def test_pred_08_a_batch_of_more_rows_than_batch_size_is_an_error(exact):
    with pytest.raises(InputError, match="The real batch size should not be greater than batch_size, 4; got 5 rows"):
        checker(exact=exact).check(Batch(features=ones(5)))


def test_a_short_training_batch_says_how_to_drop_it():
    with pytest.raises(InputError, match=r"must have params\['batch_size'\]=4 rows; got 3.*drop_last=True"):
        checker(exact=True).check(Batch(features=ones(3)))


@pytest.mark.parametrize("exact", [True, False])
def test_a_batch_without_rows_is_an_error(exact):
    with pytest.raises(InputError, match="yielded a batch without rows"):
        checker(exact=exact).check(Batch(features=ones(0, 2)))


def test_arrays_of_the_other_byte_order_keep_their_values():
    batch = to_host_batch({"x": np.array([1, 2], ">i4"), "y": np.array([0.5, 1.5], ">f8")})
    assert batch.features["x"].dtype == torch.int32 and batch.features["x"].tolist() == [1, 2]
    assert batch.features["y"].tolist() == [0.5, 1.5]


@pytest.mark.parametrize(("dtype", "mend"), [(np.longdouble, "float64"), (np.clongdouble, "complex128")])
def test_numbers_that_torch_does_not_have_are_named(dtype, mend):
    with pytest.raises(InputTypeError, match=rf"features\['x'\] must be of a dtype .*astype\('{mend}'\)"):
        to_host_batch({"x": np.ones(2, dtype)})


def test_mappings_that_torch_does_not_know_become_dicts_and_none_stays():
    class Encoding(UserDict[str, torch.Tensor]):
        """As transformers' BatchEncoding."""

    batch = to_host_batch((Encoding({"ids": ones(2, 3), "mask": None}), MappingProxyType({"y": ones(2)})))
    assert type(batch.features) is dict and batch.features["mask"] is None and type(batch.labels) is dict
    assert count_rows(batch) == 2 and checker().check(batch) == 2
    assert batch.map(lambda tensor: tensor + 1).features["mask"] is None


def test_features_of_none_alone_have_no_tensor():
    with pytest.raises(InputError, match="features without any tensor"):
        to_host_batch({"x": None})
