import math
from typing import Any

import numpy as np
import pytest
import torch

from tpuspec.summary.readable import ProgressLine, aligned_lines, format_loss, format_rate, format_value


@pytest.mark.parametrize(("value", "text"), [
    (0.1234567, "0.1235"), (1.0, "1.000"), (2.3, "2.300"), (1234.5, "1234"), (1e-7, "1.000e-07"), (math.nan, "nan"),
    (-math.inf, "-inf")])
def test_loss_has_four_digits(value: float, text: str):
    assert format_loss(value) == text


@pytest.mark.parametrize(("value", "text"), [
    (0.0312, "0.031"), (1.0, "1.0"), (81.23, "81.2"), (5231.0, "5.2k"), (1.44e6, "1.4M"), (0.0, "0")])
def test_rate_is_short(value: float, text: str):
    assert format_rate(value) == text


@pytest.mark.parametrize(("value", "text"), [
    (300, "300"), (True, "True"), (0.99995, "0.99995"), (0.95, "0.95"), (np.float32(0.1), "0.1"),
    (torch.tensor([2.5]), "2.5"), (np.array([[10, 2], [3, 40]]), "[[10, 2], [3, 40]]"), ([0.5, 0.25], "[0.5, 0.25]"),
    (np.zeros((100, 10), np.float32), "float32 [100, 10]"), ("a\nb", "a b"), (["a", "b"], "['a', 'b']"),
    (np.zeros(0), "[]"), (None, "None")])
def test_value_is_one_compact_line(value: Any, text: str):
    assert format_value(value) == text


def test_line_has_all_parts_in_order():
    line = ProgressLine(description="train", total=1000, step=300, loss=0.1234, steps_per_second=81.2,
                        examples_per_second=5200.0, step_kind="traced")
    assert line.text() == "train  step 300/1000  loss 0.1234  81.2 steps/s  5.2k examples/s  traced"


def test_line_leaves_out_what_is_not_known():
    line = ProgressLine(description="evaluate", total=None, step=3, loss=None, steps_per_second=None,
                        examples_per_second=None, step_kind="")
    assert line.text() == "evaluate  step 3"


def test_values_stand_below_one_another():
    assert aligned_lines("eval", {"loss": "1", "accuracy": "0.5"}) == ["eval", "  loss      1", "  accuracy  0.5"]
    assert aligned_lines("eval", {}) == ["eval"]
