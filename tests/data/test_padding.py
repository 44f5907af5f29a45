from typing import NamedTuple

import pytest
import torch

from tpuspec.data.padding import pad_batch, padding_like, row_mask, split_rows
from tpuspec.spec.results import Batch


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


def batch_of(num_rows: int) -> Batch:
    rows = torch.arange(1, num_rows + 1)
    return Batch(features={"x": rows.float().reshape(-1, 1).expand(-1, 3).clone(), "pair": Pair(rows, rows > 0)},
                 labels=(rows.to(torch.bfloat16), {"y": rows.to(torch.uint8)}))


def leaves(batch: Batch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    batch.map(found.append)
    return found


def test_zero_rows_stand_behind_the_real_ones_in_every_feature_and_label():
    padded = pad_batch(batch_of(2), 5)
    assert len(leaves(padded)) == 5
    for real, leaf in zip(leaves(batch_of(2)), leaves(padded), strict=True):
        assert leaf.shape == (5, *real.shape[1:])
        assert torch.equal(leaf[:2], real)
        assert not leaf[2:].any()


def test_padding_keeps_dtypes_and_nesting():
    padded = pad_batch(batch_of(2), 5)
    assert [leaf.dtype for leaf in leaves(padded)] == [
        torch.float32, torch.int64, torch.bool, torch.bfloat16, torch.uint8]
    assert isinstance(padded.features["pair"], Pair)
    assert isinstance(padded.labels, tuple)


def test_a_full_batch_is_not_copied():
    full = batch_of(4)
    for before, after in zip(leaves(full), leaves(pad_batch(full, 4)), strict=True):
        assert after is before


def test_labels_that_are_none_stay_none():
    assert pad_batch(Batch(features=torch.ones(1, 2)), 3).labels is None
    assert padding_like(Batch(features=torch.ones(1, 2)), 3).labels is None


def test_a_batch_of_padding_has_the_row_shapes_and_dtypes_of_a_real_one():
    real, padding = batch_of(3), padding_like(batch_of(3), 4)
    assert [(leaf.shape, leaf.dtype) for leaf in leaves(padding)] == [
        ((4, *leaf.shape[1:]), leaf.dtype) for leaf in leaves(real)]
    assert not any(leaf.any() for leaf in leaves(padding))


@pytest.mark.parametrize(("num_real", "expected"), [(0, [0, 0, 0]), (2, [1, 1, 0]), (3, [1, 1, 1])])
def test_the_mask_is_true_for_the_real_rows(num_real, expected):
    mask = row_mask(num_real, 3)
    assert mask.dtype is torch.bool
    assert mask.tolist() == [bool(real) for real in expected]


@pytest.mark.parametrize("num_parts", [1, 2, 3, 6])
def test_parts_are_equal_contiguous_and_in_order(num_parts):
    parts = split_rows(batch_of(6), num_parts)
    assert len(parts) == num_parts
    assert {leaf.shape[0] for part in parts for leaf in leaves(part)} == {6 // num_parts}
    for i, whole in enumerate(leaves(batch_of(6))):
        assert torch.equal(torch.cat([leaves(part)[i] for part in parts]), whole)


@pytest.mark.parametrize(("num_samples", "masks"), [(5, [[1, 1], [1, 1], [1, 0]]), (4, [[1, 1], [1, 1]])])
def test_pred_04_five_samples_in_batches_of_two_end_with_one_real_row_first(num_samples, masks):
    rows = torch.arange(1.0, num_samples + 1)
    batches = [Batch(features=rows[i:i + 2], labels=-rows[i:i + 2]) for i in range(0, num_samples, 2)]
    padded = [pad_batch(batch, 2) for batch in batches]
    assert [row_mask(len(batch.features), 2).int().tolist() for batch in batches] == masks
    assert all(batch.features.shape == batch.labels.shape == (2,) for batch in padded)
    if num_samples == 5:
        assert padded[-1].features.tolist() == [5.0, 0.0]
        assert padded[-1].labels.tolist() == [-5.0, 0.0]
