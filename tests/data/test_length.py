import itertools

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tpuspec.data.length import InputLength, length_of

ROWS = TensorDataset(torch.arange(10.0))
LIST = {"kind": "list", "batches": 0}


@pytest.mark.parametrize(("loader", "num_batches", "last_rows"), [
    (DataLoader(ROWS, batch_size=4), 3, 2), (DataLoader(ROWS, batch_size=4, drop_last=True), 2, 4),
    (DataLoader(ROWS, batch_size=5), 2, 5), (DataLoader(ROWS, batch_size=None), 10, None),
    (DataLoader(ROWS, batch_sampler=[[0, 1], [2]]), 2, None)])
def test_a_loader_over_a_dataset_of_known_length_has_one(loader, num_batches, last_rows):
    assert length_of(loader, {"kind": "iterable", "batches": 0}) == InputLength(
        num_batches=num_batches, last_rows=last_rows)


class Endless(IterableDataset):
    def __iter__(self):
        return itertools.count()

    def __len__(self):
        return 3


@pytest.mark.parametrize("source", [DataLoader(Endless()), Endless(), iter([1]), ROWS])
def test_other_inputs_have_no_known_length(source):
    assert length_of(source, {"kind": "iterable", "batches": 0}) is None


def test_a_list_has_the_length_of_what_is_left_of_it():
    batches = [torch.ones(4, 1), torch.ones(4, 1), {"x": torch.ones(1, 1), "name": ["a"]}]
    assert length_of(batches, LIST) == InputLength(num_batches=3, last_rows=1)
    assert length_of(batches, LIST | {"batches": 2}) == InputLength(num_batches=1, last_rows=1)


@pytest.mark.parametrize(("batches_per_step", "step"), [(1, 5), (2, 3)])
def test_a_short_last_batch_is_drawn_by_the_last_step(batches_per_step, step):
    assert InputLength(num_batches=5, last_rows=3).short_step(4, batches_per_step) == step
    assert InputLength(num_batches=5, last_rows=4).short_step(4, batches_per_step) is None
