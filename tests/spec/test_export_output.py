"""The kinds of export output and their own rules."""

from __future__ import annotations

import pytest
import torch

from tpuspec.errors import SpecError, SpecTypeError
from tpuspec.spec.export_output import (
    ClassificationOutput,
    ExportOutput,
    PredictOutput,
    RegressionOutput,
    check_export_outputs,
)


def test_a_bare_tensor_is_served_as_output():
    tensor = torch.zeros(2)
    outputs = PredictOutput(tensor).outputs
    assert list(outputs) == ["output"]
    assert outputs["output"] is tensor


def test_named_tensors_keep_their_names_and_order_and_are_not_the_callers_dict():
    named = {"z": torch.zeros(2), "a": torch.ones(2)}
    output = PredictOutput(named)
    named["later"] = torch.zeros(2)
    assert list(output.outputs) == ["z", "a"]


def test_a_prediction_that_is_no_tensor_is_refused_by_name():
    with pytest.raises(SpecTypeError, match="Prediction output 'scores' must be a Tensor; got list"):
        PredictOutput({"scores": [1.0]})


def test_a_name_that_is_no_string_is_refused():
    with pytest.raises(SpecTypeError, match="Prediction output key must be a string; got 1"):
        PredictOutput({1: torch.zeros(2)})


def test_a_classification_takes_scores_or_classes_or_both():
    scores, classes = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    assert ClassificationOutput(scores=scores).scores is scores
    assert ClassificationOutput(scores=scores).classes is None
    assert ClassificationOutput(classes=classes).classes is classes
    both = ClassificationOutput(scores, classes)
    assert both.scores is scores
    assert both.classes is classes


def test_a_classification_without_scores_and_classes_is_refused():
    with pytest.raises(SpecError, match="At least one of scores and classes must be set"):
        ClassificationOutput()


@pytest.mark.parametrize("field", ["scores", "classes"])
def test_a_classification_value_that_is_no_tensor_is_refused_by_name(field):
    with pytest.raises(SpecTypeError, match=f"Classification {field} must be a Tensor; got str"):
        ClassificationOutput(**{field: "cat"})


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_scores_and_regression_values_must_be_floating_point(dtype):
    tensor = torch.zeros(2, dtype=dtype)
    with pytest.raises(SpecError, match=f"Classification scores must be floating point; got {dtype}"):
        ClassificationOutput(scores=tensor)
    with pytest.raises(SpecError, match=f"Regression value must be floating point; got {dtype}"):
        RegressionOutput(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_floating_point_regression_value_is_kept(dtype):
    value = torch.zeros(2, dtype=dtype)
    assert RegressionOutput(value).value is value


@pytest.mark.parametrize("value", [None, 1.0])
def test_a_regression_value_that_is_no_tensor_is_refused(value):
    with pytest.raises(SpecTypeError, match="Regression value must be a Tensor"):
        RegressionOutput(value)


def test_an_export_output_of_the_users_own_is_accepted():
    class RankingOutput(ExportOutput):
        """A kind of the user's."""

    ranking = RankingOutput()
    outputs = check_export_outputs({"ranking": ranking}, torch.zeros(2))
    assert outputs == {"ranking": ranking, "serving_default": ranking}


def test_adding_the_default_leaves_the_callers_dict_alone():
    given = {"price": RegressionOutput(torch.zeros(2))}
    check_export_outputs(given, torch.zeros(2))
    assert list(given) == ["price"]


def test_the_error_of_several_outputs_lists_them_and_says_how_to_mend_it():
    given = {name: PredictOutput(torch.zeros(2)) for name in ("b", "a")}
    with pytest.raises(SpecError, match=r"\['a', 'b'\].*Name one of them 'serving_default'"):
        check_export_outputs(given, torch.zeros(2))


def test_no_outputs_at_all_are_not_reported_as_several():
    with pytest.raises(SpecError, match="export_outputs") as caught:
        check_export_outputs({}, torch.zeros(2))
    assert "Multiple" not in str(caught.value)
