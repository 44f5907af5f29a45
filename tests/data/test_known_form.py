from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tpuspec.data.known_form import KnownForm
from tpuspec.data.structure import to_host_batch
from tpuspec.spec.results import Batch


def learned(element: Any) -> KnownForm:
    known = KnownForm()
    known.learn(element, to_host_batch(element))
    return known


def x(rows: int = 2) -> torch.Tensor:
    return torch.rand(rows, 3)


def y(rows: int = 2) -> torch.Tensor:
    return torch.zeros(rows, dtype=torch.int64)


@pytest.mark.parametrize("make", [
    lambda: x(), lambda: (x(), y()), lambda: {"a": x(), "b": y()}, lambda: ({"a": x()}, {"b": y()})])
def test_an_element_of_a_form_that_was_learned_becomes_its_batch(make):
    known, element = learned(make()), make()
    batch, expected = known.batch(element), to_host_batch(element)
    assert batch is not None
    assert [t.data_ptr() for t in batch.tensors()] == [t.data_ptr() for t in expected.tensors()]
    assert type(batch.features) is type(expected.features) and type(batch.labels) is type(expected.labels)


@pytest.mark.parametrize(("first", "other"), [
    ((x(), y()), (x(1), y(1))), ((x(), y()), (x(), y(1))), ((x(), y()), (x(), y().float())), ((x(), y()), x()),
    ((x(), y()), [x(), y()]), ((x(), y()), (x(), y(), y())), ((x(), y()), (x().numpy(), y())),
    ((x(), y()), (x().requires_grad_(), y())), ((x(), y()), (x().to_sparse(), y())),
    ({"a": x(), "b": x()}, {"b": x(), "a": x()}), ({"a": x()}, {"a": x(), "b": x()}), ({"a": x()}, {"a": np.ones(2)}),
    ((x(), y()), None)])
def test_another_form_is_not_known(first, other):
    assert learned(first).batch(first) is not None
    assert learned(first).batch(other) is None


@pytest.mark.parametrize("element", [
    [x(), y()], (np.ones((2, 3)), y()), (x().requires_grad_(), y()), ({"a": {"b": x()}}, y()), ((x(), x()), y())])
def test_some_forms_are_never_learned(element):
    assert learned(element).batch(element) is None


def test_a_form_is_not_learned_where_the_batch_has_other_tensors():
    known = KnownForm()
    known.learn((x(3), y(3)), to_host_batch((x(3).T, y(3))))
    assert known.batch((x(3), y(3))) is None


def test_a_form_can_be_forgotten():
    known = learned((x(), y()))
    known.forget()
    assert known.batch((x(), y())) is None


def test_a_dict_that_the_input_fills_anew_does_not_change_an_earlier_batch():
    reused = {"a": x()}
    batch = learned(reused).batch(reused)
    reused["a"] = x()
    assert batch is not None and batch.features["a"] is not reused["a"]


def test_a_form_is_learned_from_a_batch_whose_labels_were_dropped():
    known, element = KnownForm(), (x(), y())
    known.learn(element, Batch(features=element[0]))
    assert known.batch((x(), y())) is not None


def test_a_form_is_not_learned_where_the_batch_was_cast():
    known, element = KnownForm(), (x(), y())
    known.learn(element, to_host_batch(element).map(lambda tensor: tensor.bfloat16()))
    assert known.batch(element) is None
