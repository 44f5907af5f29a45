import re

import pytest
import torch
from torch import nn

from tpuspec.errors import ConfigError
from tpuspec.precision import Precision, cast_module, cast_tensor, for_host, parse_precision, reduction_dtype


class Shared(nn.Module):
    """Two layers with one weight and one buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.weight = self.first.weight
        self.first.register_buffer("scale", torch.ones(2, dtype=torch.float64))
        self.second.register_buffer("scale", self.first.scale)
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("precision", list(Precision))
def test_casting_a_module_keeps_what_is_shared_and_what_is_no_float(precision):
    module = Shared()
    parameters = list(module.parameters())
    assert cast_module(module, precision) is module
    assert {p.dtype for p in module.parameters()} == {precision.dtype}
    assert [id(p) for p in module.parameters()] == [id(p) for p in parameters]
    assert module.first.weight is module.second.weight
    assert module.first.scale is module.second.scale
    assert module.first.scale.dtype is precision.dtype
    assert module.count.dtype is torch.int64


def test_without_a_precision_nothing_is_cast():
    module = Shared()
    assert cast_module(module, None).first.scale.dtype is torch.float64
    assert cast_tensor(torch.ones(1, dtype=torch.float64), None).dtype is torch.float64


def test_bf16_refuses_complex_numbers_by_name():
    module = nn.Module()
    module.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ConfigError, match=r"bf16 has no complex numbers, and phase of the model is torch.complex64"):
        cast_module(module, Precision.bf16)
    assert cast_module(module, Precision.bf16_mixed).phase.dtype is torch.complex64


@pytest.mark.parametrize("precision", list(Precision))
def test_a_precision_is_known_by_its_name(precision):
    assert parse_precision(precision) is parse_precision(precision.value) is precision
    assert parse_precision(None) is None


@pytest.mark.parametrize("name", ["half", "float32", "bfloat16", "32-true", "mixed", "BF16", "fp16"])
def test_another_librarys_name_gets_a_suggestion(name):
    with pytest.raises(ConfigError, match=f"got {re.escape(repr(name))}. Did you mean '(fp32|bf16|bf16-mixed)'"):
        parse_precision(name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float16, torch.float64, torch.int8])
def test_the_host_gets_what_numpy_has(dtype):
    values = torch.tensor([0.0, 1.0, 3.0]).to(dtype)
    assert for_host(values).numpy().tolist() == [0.0, 1.0, 3.0]


@pytest.mark.parametrize(("dtype", "reduced"), [
    (torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float32),
    (torch.float64, torch.float64), (torch.complex64, torch.complex64)])
def test_gradients_are_summed_in_float32_at_least(dtype, reduced):
    assert reduction_dtype(dtype) is reduced
