import functools
import pickle

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tests.faults.aftermath import nothing_left
from tpuspec.data.workers import WorkerBatches, _start_worker, start_iterator

ROWS = TensorDataset(torch.arange(8))
marks = []


def mark(worker):
    marks.append(worker)


class Stream(IterableDataset):
    """Worker 0 yields one row, worker 1 many."""

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        return iter(range(20 if worker is not None and worker.id else 1))


def test_only_a_loader_with_workers_is_watched():
    assert not isinstance(start_iterator([1]), WorkerBatches)
    assert not isinstance(start_iterator(DataLoader(ROWS)), WorkerBatches)


def test_batches_come_in_order_and_the_loader_is_as_it_was():
    loader = DataLoader(ROWS, batch_size=2, num_workers=2, worker_init_fn=mark)
    with nothing_left():
        batches = start_iterator(loader)
        assert loader.worker_init_fn is mark
        assert [batch.tolist() for (batch,) in batches] == [[0, 1], [2, 3], [4, 5], [6, 7]]
        batches.close()


def test_a_worker_that_has_no_rows_left_is_not_dead():
    with nothing_left():
        assert sorted(batch.item() for batch in start_iterator(DataLoader(Stream(), num_workers=2))) == [0, *range(20)]


def test_persistent_workers_stay_for_the_next_iteration():
    loader = DataLoader(ROWS, batch_size=4, num_workers=1, persistent_workers=True)
    with nothing_left():
        for _ in range(2):
            batches = start_iterator(loader)
            assert next(batches)[0].tolist() == [0, 1, 2, 3]
            pids = {worker.pid for worker in batches._iterator._workers}
            batches.close()
            del batches
        assert {worker.pid for worker in loader._iterator._workers} == pids
        del loader


def test_closing_early_ends_the_workers_though_the_iterator_is_held():
    with nothing_left():
        held = start_iterator(DataLoader(ROWS, batch_size=2, num_workers=2))
        next(held)
        held.close()
    assert held is not None


def test_what_starts_a_worker_can_be_sent_to_a_spawned_one():
    assert pickle.loads(pickle.dumps(functools.partial(_start_worker, mark))).args == (mark,)


@pytest.mark.slow
def test_spawned_workers_serve_too():
    with nothing_left():
        batches = start_iterator(DataLoader(ROWS, batch_size=4, num_workers=1, multiprocessing_context="spawn"))
        assert [batch.tolist() for (batch,) in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]
