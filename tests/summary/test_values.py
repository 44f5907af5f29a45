from typing import Any

import numpy as np
import pytest
import torch

from tpuspec.errors import ConfigError, ConfigTypeError
from tpuspec.summary.values import array_value, image_value, scalar_value, step_value, text_value


@pytest.mark.parametrize("value", [
    2, 2.0, np.float32(2), np.array([2]), np.array(2.0), torch.tensor(2), torch.tensor([[2.0]], dtype=torch.bfloat16),
    torch.tensor([2.0], requires_grad=True)])
def test_one_number_of_any_kind_is_a_scalar(value: Any):
    result = scalar_value("loss", value)
    assert result == 2.0
    assert type(result) is float


@pytest.mark.parametrize("value", [torch.zeros(3), np.zeros((1, 2)), torch.zeros(0)])
def test_scalar_of_several_elements_is_refused_with_its_shape(value: Any):
    with pytest.raises(ConfigError, match=r"scalar 'loss' takes one number; got shape \[.*value\.mean\(\)"):
        scalar_value("loss", value)


@pytest.mark.parametrize("value", ["1", None, [1.0], 1j])
def test_scalar_of_another_type_is_refused(value: Any):
    with pytest.raises(ConfigTypeError, match="scalar 'loss' takes a number"):
        scalar_value("loss", value)


def test_complex_array_is_refused():
    with pytest.raises(ConfigTypeError, match=r"'loss' takes real numbers; got .* of complex64"):
        scalar_value("loss", torch.tensor([1j]))


@pytest.mark.parametrize("step", [7, np.int32(7), torch.tensor([7]), np.array(7)])
def test_one_integer_of_any_kind_is_a_step(step: Any):
    result = step_value(step)
    assert result == 7
    assert type(result) is int


def test_step_of_several_replicas_is_refused_with_the_remedy():
    with pytest.raises(ConfigError, match=r"got shape \[2\].*global_step\[0\]"):
        step_value(torch.tensor([7, 7]))


@pytest.mark.parametrize("step", [1.0, True, "1", None, torch.tensor([1.0])])
def test_step_that_is_no_integer_is_refused(step: Any):
    with pytest.raises(ConfigTypeError, match="step must be an integer"):
        step_value(step)


def test_lists_are_arrays_but_ragged_ones_are_refused():
    assert array_value("weights", [1, 2.5]).tolist() == [1.0, 2.5]
    with pytest.raises(ConfigTypeError, match="'weights' takes a tensor, an array or numbers; got list"):
        array_value("weights", [[1], [2, 3]])


@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 3), (3, 2, 3), (4, 2, 3), (5, 3, 2, 3), (5, 1, 2, 3)])
def test_image_keeps_its_shape(shape: tuple[int, ...]):
    assert image_value("digits", torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("shape", [(3,), (2, 4, 4), (5, 4, 2, 3), (0, 3), (1, 1, 1, 1, 1)])
def test_image_of_another_shape_is_refused(shape: tuple[int, ...]):
    with pytest.raises(ConfigError, match=r"image 'digits' must be \[H, W\]"):
        image_value("digits", np.zeros(shape))


def test_float_image_is_scaled_and_clipped_and_nan_is_black():
    pixels = image_value("digits", torch.tensor([[-1.0, 0.5, 2.0, float("nan"), float("inf")]]))
    assert pixels.dtype == np.uint8
    assert pixels.tolist() == [[0, 127, 255, 0, 255]]


def test_bytes_of_an_image_are_left_and_bools_are_black_and_white():
    assert image_value("digits", np.array([[7]], np.uint8)).tolist() == [[7]]
    assert image_value("mask", torch.tensor([[True, False]])).tolist() == [[255, 0]]


def test_image_of_wide_integers_is_refused():
    with pytest.raises(ConfigTypeError, match=r"float in 0\.\.1, or uint8; got int64"):
        image_value("digits", torch.zeros(2, 2, dtype=torch.int64))


def test_text_and_names_must_be_strings():
    with pytest.raises(ConfigTypeError, match="text 'note' takes a str; got int"):
        text_value("note", 3)
    with pytest.raises(ConfigTypeError, match="name must be a str; got 3"):
        scalar_value(3, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="name must be non-empty"):
        scalar_value("", 1.0)
