from __future__ import annotations

import torch

from tpuspec.drain.assemble import join_rows
from tpuspec.spec.results import StepRows


def rows(*real: int) -> StepRows:
    return StepRows(mask=torch.tensor(real, dtype=torch.bool), num_rows=sum(real))


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def test_eval_09_tensors_are_concatenated_in_replica_order():
    joined = join_rows([[t(1, 2), t(1)], [t(3, 4), t(2)]], rows(1, 1, 1, 1))
    assert [tensor.tolist() for tensor in joined] == [[1, 2, 3, 4], [1, 2]]


def test_host_06_a_step_tensor_of_one_element_becomes_one_a_replica():
    joined = join_rows([{"step": torch.tensor([5])}, {"step": torch.tensor([5])}], rows(1, 1, 1, 1))
    assert joined["step"].tolist() == [5, 5]


def test_a_dict_stays_a_dict_with_its_keys_in_order():
    joined = join_rows([{"b": t(1), "a": t(2)}, {"b": t(3), "a": t(4)}], rows(1, 1, 1, 1))
    assert list(joined) == ["b", "a"]
    assert {name: tensor.tolist() for name, tensor in joined.items()} == {"b": [1, 3], "a": [2, 4]}


def test_padding_rows_are_dropped_from_batch_major_tensors_of_every_rank():
    wide = torch.arange(8.0).reshape(4, 2)
    joined = join_rows([[wide[:2], t(1, 2)], [wide[2:], t(3, 4)]], rows(1, 1, 1, 0))
    assert joined[0].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert joined[1].tolist() == [1, 2, 3]


def test_padding_in_the_middle_is_dropped_too():
    assert join_rows([[t(1, 0)], [t(3, 0)]], rows(1, 0, 1, 0))[0].tolist() == [1, 3]


def test_tensors_that_are_not_batch_major_keep_all_their_rows():
    joined = join_rows([[t(7), t(1, 2, 3)], [t(8), t(4, 5, 6)]], rows(1, 1, 1, 0))
    assert [tensor.tolist() for tensor in joined] == [[7, 8], [1, 2, 3, 4, 5, 6]]


def test_scalar_losses_become_one_a_replica():
    assert join_rows([torch.tensor(1.0), torch.tensor(2.0)], rows(1, 1, 1, 0)).tolist() == [1, 2]


def test_per_example_losses_lose_their_padding():
    assert join_rows([t(1, 2), t(3, 0)], rows(1, 1, 1, 0)).tolist() == [1, 2, 3]


def test_scalar_losses_stay_one_a_replica_where_each_replica_has_one_row():
    losses = join_rows([torch.tensor(float(i)) for i in range(4)], rows(1, 1, 0, 0))
    assert losses.tolist() == [0, 1, 2, 3]


def test_one_replica_without_padding_is_not_copied():
    tensor = t(1, 2)
    assert join_rows([{"x": tensor}], rows(1, 1))["x"] is tensor


def test_no_tensors_stay_none():
    assert join_rows([[], []], rows(1)) == []
