import itertools

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from tpuspec.data.source import raw_batches
from tpuspec.data.structure import to_host_batch
from tpuspec.errors import InputError, InputTypeError
from tpuspec.spec.mode import ModeKeys

TRAIN, EVAL, PREDICT = ModeKeys.TRAIN, ModeKeys.EVAL, ModeKeys.PREDICT


class Rows(Dataset):
    """Row i is i."""

    def __init__(self, num_rows):
        self.num_rows = num_rows

    def __len__(self):
        return self.num_rows

    def __getitem__(self, index):
        return torch.tensor(index)


class Stream(IterableDataset):
    def __init__(self, num_rows):
        self.num_rows = num_rows

    def __iter__(self):
        return iter(range(self.num_rows))


def my_input_fn(params):
    raise NotImplementedError


def batches_of(source, mode=EVAL, batch_size=4, seed=0):
    return raw_batches(source, input_fn=my_input_fn, mode=mode, batch_size=batch_size, seed=seed)


def epochs(num_epochs, *, num_rows=12, batch_size=4, seed=0):
    """Returns the rows of each training epoch, in their order."""
    num_batches = num_rows // batch_size
    batches = itertools.islice(batches_of(Rows(num_rows), TRAIN, batch_size, seed), num_epochs * num_batches)
    rows, size = torch.cat(list(batches)).tolist(), num_batches * batch_size
    return [rows[i:i + size] for i in range(0, len(rows), size)]


@pytest.mark.parametrize("mode", [EVAL, PREDICT])
def test_a_dataset_keeps_its_order_and_its_short_last_batch_outside_training(mode):
    assert [batch.tolist() for batch in batches_of(Rows(10), mode)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_training_dataset_is_shuffled_and_every_epoch_has_every_row_once():
    first, second, third = epochs(3)
    assert sorted(first) == sorted(second) == sorted(third) == list(range(12))
    assert first != list(range(12))
    assert first != second != third


def test_the_shuffle_depends_on_the_seed_alone():
    torch.manual_seed(1)
    once = epochs(3, seed=5)
    torch.manual_seed(2)
    assert epochs(3, seed=5) == once
    assert epochs(3, seed=6)[0] != once[0]


def test_a_training_dataset_drops_the_short_last_batch_of_an_epoch():
    for epoch in epochs(3, num_rows=10):
        assert len(set(epoch)) == 8


@pytest.mark.parametrize("mode", [TRAIN, EVAL])
@pytest.mark.parametrize("dataset", [Rows(8), Stream(8), TensorDataset(torch.arange(8))])
def test_the_global_random_state_is_left_alone(mode, dataset):
    before = torch.get_rng_state()
    list(itertools.islice(batches_of(dataset, mode), 2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("mode", "expected"), [
    (TRAIN, [[0, 1, 2, 3], [4, 5, 6, 7]]), (EVAL, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]])])
def test_an_iterable_dataset_is_batched_and_read_once_in_order(mode, expected):
    assert [batch.tolist() for batch in batches_of(Stream(10), mode)] == expected


def test_a_dataset_of_pairs_makes_features_and_labels():
    dataset = TensorDataset(torch.arange(8.0).reshape(4, 2), torch.arange(4))
    (batch,) = [to_host_batch(element) for element in batches_of(dataset)]
    assert batch.features.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert batch.labels.tolist() == [0, 1, 2, 3]


def test_a_data_loader_with_default_collate_batches_by_itself():
    rows = [({"x": np.full(2, i, np.float32)}, i) for i in range(5)]
    made = [to_host_batch(element) for element in batches_of(DataLoader(rows, batch_size=2), batch_size=None)]
    assert [batch.labels.tolist() for batch in made] == [[0, 1], [2, 3], [4]]
    assert made[2].features["x"].tolist() == [[4.0, 4.0]]


@pytest.mark.parametrize("source", [[1, 2, 3], (i for i in (1, 2, 3)), iter([1, 2, 3])])
def test_any_other_iterable_yields_as_it_is(source):
    assert list(batches_of(source, batch_size=None)) == [1, 2, 3]


class OwnError(Exception):
    pass


class Failing(Rows):
    def __getitem__(self, index):
        if index == 5:
            raise OwnError("row 5")
        return super().__getitem__(index)


def failing_generator():
    yield torch.arange(4)
    raise OwnError("row 5")


@pytest.mark.parametrize("source", [failing_generator(), Failing(8), DataLoader(Failing(8), batch_size=4)])
def test_an_error_of_the_input_passes_through_unchanged(source):
    batches = batches_of(source)
    assert next(batches).tolist() == [0, 1, 2, 3]
    with pytest.raises(OwnError, match="^row 5$") as caught:
        next(batches)
    assert type(caught.value) is OwnError


@pytest.mark.parametrize(("batch", "kind"), [
    (torch.ones(4, 2), "Tensor"), (np.ones(4), "ndarray"), ((torch.ones(4), torch.ones(4)), "tuple"),
    ({"x": torch.ones(4)}, "dict")])
def test_one_batch_instead_of_an_iterable_of_batches_is_an_error_that_says_what_to_return(batch, kind):
    with pytest.raises(InputError, match=rf"my_input_fn.* got one batch \({kind}\). Return \[batch\] for a single"):
        batches_of(batch)


@pytest.mark.parametrize(("source", "kind"), [(None, "NoneType"), (3, "int"), (my_input_fn, "function")])
def test_something_that_cannot_be_iterated_is_a_type_error(source, kind):
    with pytest.raises(InputTypeError, match=f"my_input_fn.* should return a Dataset, .*; got {kind}"):
        batches_of(source)


def test_a_training_dataset_of_less_than_one_batch_is_an_error():
    with pytest.raises(InputError, match="the training Dataset has 3 rows, less than one batch of 4"):
        next(batches_of(Rows(3), TRAIN))


@pytest.mark.parametrize("mode", [TRAIN, EVAL])
def test_an_empty_dataset_yields_nothing(mode):
    assert list(batches_of(Rows(0), mode)) == []


@pytest.mark.parametrize("dataset", [Rows(8), Stream(8)])
def test_a_dataset_without_a_batch_size_is_an_error(dataset):
    with pytest.raises(InputError, match="a Dataset needs a batch size to be batched by; pass .* of mode eval"):
        next(batches_of(dataset, batch_size=None))
