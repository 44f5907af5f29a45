"""scaffold_fn: what it may return and what it must not hold."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from tpuspec.errors import SpecError, SpecTypeError
from tpuspec.spec.scaffold import Scaffold, check_no_captured_tensor, make_scaffold


def scaffold_fn_with(value):
    """A scaffold_fn whose closure holds `value`."""
    def scaffold_fn():
        return Scaffold(ready_fn=lambda module: str(value))
    return scaffold_fn


def test_no_scaffold_fn_gives_an_empty_scaffold():
    assert make_scaffold(None) == Scaffold(init_fn=None, restore=None, saver=None, ready_fn=None)


def test_the_scaffold_that_scaffold_fn_returns_is_used():
    scaffold = Scaffold(saver=lambda module: {})
    assert make_scaffold(lambda: scaffold) is scaffold


def test_a_scaffold_fn_that_returns_none_is_refused():
    with pytest.raises(SpecError, match="scaffold_fn returns None, which is not allowed"):
        make_scaffold(lambda: None)


@pytest.mark.parametrize("value", [0, {}, Scaffold], ids=["0", "dict", "class"])
def test_a_scaffold_fn_that_returns_something_else_is_refused(value):
    with pytest.raises(SpecTypeError, match="scaffold_fn must return a Scaffold"):
        make_scaffold(lambda: value)


def test_an_error_of_scaffold_fn_surfaces_as_itself():
    def scaffold_fn():
        raise KeyError("shadow")

    with pytest.raises(KeyError, match="shadow"):
        make_scaffold(scaffold_fn)


def test_a_captured_tensor_is_a_value_error_that_names_it_and_scaffold_fn_does_not_run():
    called = []

    def model_fn():
        activations = torch.zeros(2)

        def scaffold_fn():
            called.append(activations)
            return Scaffold()
        return scaffold_fn

    with pytest.raises(ValueError, match="Inside scaffold_fn: 'activations' depends on TPU computation") as caught:
        make_scaffold(model_fn())
    assert isinstance(caught.value, SpecError)
    assert called == []


def test_a_tensor_captured_by_a_bound_method_is_found():
    tensor = torch.zeros(2)

    class Maker:
        def make(self):
            return Scaffold(ready_fn=lambda module: str(tensor))

    with pytest.raises(SpecError, match="'tensor'"):
        make_scaffold(Maker().make)


def test_a_tensor_captured_below_a_partial_is_found():
    tensor = torch.zeros(2)

    def build(decay):
        return Scaffold(ready_fn=lambda module: str(tensor * decay))

    with pytest.raises(SpecError, match="'tensor'"):
        make_scaffold(functools.partial(build, 0.9))


@pytest.mark.parametrize("value", [nn.Linear(1, 1), 0.9, "path", {"decay": 0.9}],
                         ids=["module", "float", "str", "dict"])
def test_a_closure_without_tensors_is_fine(value):
    assert make_scaffold(scaffold_fn_with(value)).ready_fn(nn.Identity()) == str(value)


def test_a_variable_that_is_captured_before_it_is_set_is_fine():
    def scaffold_fn():
        return later

    check_no_captured_tensor(scaffold_fn)
    later = Scaffold()
    assert make_scaffold(scaffold_fn) is later


class Factory:
    """A callable object has no closure of its own."""

    def __call__(self):
        return Scaffold(init_fn=nn.Module.eval)


def test_a_callable_object_may_be_a_scaffold_fn():
    assert make_scaffold(Factory()).init_fn is nn.Module.eval
