"""Host functions: how tensors are matched, checked and passed, beyond the rows SPEC-02 .. SPEC-04."""

from __future__ import annotations

import functools
import logging

import pytest
import torch

from tpuspec.errors import SpecTypeError, SpecUsageError
from tpuspec.spec.host_call import (
    HostCall,
    call_host_function,
    check_host_call,
    check_host_tensors,
    check_keywords,
    named_tensors,
)


class Recorder:
    """A callable object with a keyword-only argument."""

    def __init__(self) -> None:
        self.seen = []

    def __call__(self, loss, *, step):
        self.seen.append((loss, step))
        return "called"


def subtract(left, right):
    return left - right


def test_a_list_is_passed_by_position_and_a_dict_by_keyword():
    left, right = torch.tensor([5.0]), torch.tensor([2.0])
    assert call_host_function("host_call", subtract, [left, right]).item() == 3.0
    assert call_host_function("host_call", subtract, (right, left)).item() == -3.0
    assert call_host_function("host_call", subtract, {"right": right, "left": left}).item() == 3.0


def test_a_dict_reaches_keyword_only_arguments_of_a_callable_object():
    recorder, loss, step = Recorder(), torch.tensor([1.0]), torch.tensor([4])
    assert call_host_function("host_call", recorder, {"step": step, "loss": loss}) == "called"
    assert recorder.seen == [(loss, step)]


def test_a_dict_reaches_a_function_that_takes_any_keyword():
    tensors = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}
    assert call_host_function("host_call", lambda **named: named, tensors) == tensors


def test_a_partial_gets_only_what_it_lacks():
    host_call = (functools.partial(subtract, right=torch.tensor([1.0])), [torch.tensor([5.0])])
    check_host_call("host_call", host_call)
    assert call_host_function("host_call", *host_call).item() == 4.0


def test_keyword_only_parameters_do_not_count_as_positional():
    check_host_call("host_call", (lambda a, *, tag="x": a, [torch.zeros(1)]))
    with pytest.raises(SpecUsageError, match=r"length of tensors 2 .* takes 1"):
        check_host_call("host_call", (lambda a, *, tag="x": a, [torch.zeros(1)] * 2))


def test_a_builtin_without_a_readable_signature_is_not_counted():
    check_host_call("host_call", (dict, [torch.zeros(1)] * 3))
    check_keywords("host_call", dict, {"a": torch.zeros(1)})


def test_a_host_call_named_tuple_is_as_good_as_a_pair():
    host_call = HostCall(subtract, [torch.tensor([5.0]), torch.tensor([2.0])])
    check_host_call("host_call", host_call)
    assert call_host_function("host_call", *host_call).item() == 3.0


def test_a_mismatch_is_found_without_calling_the_function():
    recorder = Recorder()
    with pytest.raises(TypeError, match=r"host_call, \['loss', 'step', 'stp'\], do not match.*'stp'"):
        check_keywords("host_call", recorder, {"loss": torch.zeros(1), "step": torch.zeros(1), "stp": torch.zeros(1)})
    assert recorder.seen == []


def test_a_fitting_call_logs_nothing(caplog):
    with caplog.at_level(logging.DEBUG):
        call_host_function("host_call", subtract, {"left": torch.zeros(1), "right": torch.zeros(1)})
    assert caplog.records == []


def test_tensors_are_named_by_key_or_by_position_in_order():
    a, b = torch.zeros(1), torch.ones(1)
    assert [name for name, _ in named_tensors({"z": a, "a": b})] == ["z", "a"]
    assert [(name, t is expected) for (name, t), expected in zip(named_tensors([a, b]), (a, b), strict=True)] == [
        ("0", True), ("1", True)]


@pytest.mark.parametrize(("tensors", "shown"), [
    ({"step": torch.tensor(3)}, "'step'"), ([torch.zeros(2), torch.tensor(3)], "'1'")])
def test_a_scalar_is_a_runtime_error_that_names_it_and_says_to_reshape_to_1(tensors, shown):
    with pytest.raises(RuntimeError, match=rf"host_call .*scalar {shown}.*Reshape it to \[1\]") as caught:
        check_host_tensors("host_call", tensors, batch_size=None)
    assert isinstance(caught.value, SpecUsageError)


def test_a_value_that_is_no_tensor_is_a_type_error_that_names_it():
    with pytest.raises(SpecTypeError, match="eval_metrics tensor 'weight' must be a Tensor; got float"):
        check_host_tensors("eval_metrics", {"weight": 1.0}, batch_size=None)


@pytest.mark.parametrize("shape", [(3,), (5, 4), (1,)])
def test_where_rows_matter_a_tensor_of_another_number_of_rows_is_refused(shape):
    with pytest.raises(SpecUsageError, match=rf"'logits' must be batch-major, \[4, ...\]; got shape \[{shape[0]}"):
        check_host_tensors("eval_metrics", {"logits": torch.zeros(shape)}, batch_size=4)


def test_batch_major_tensors_pass_and_any_rank_above_0_passes_where_rows_do_not_matter():
    check_host_tensors("eval_metrics", [torch.zeros(4), torch.zeros(4, 2)], batch_size=4)
    check_host_tensors("host_call", [torch.zeros(1), torch.zeros(3, 2)], batch_size=None)
