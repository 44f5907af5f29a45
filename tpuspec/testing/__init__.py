"""What tests of model_fns need: a backend without devices, a tiny model, a writer in memory, a clock set by hand."""

from tpuspec.testing.backend import FakeBackend
from tpuspec.testing.clock import ManualClock
from tpuspec.testing.models import (
    linear_input_fn,
    linear_model,
    linear_model_fn,
    linear_optimizer,
    linear_rows,
)
from tpuspec.testing.writer import MemoryWriter

__all__ = [
    "FakeBackend",
    "ManualClock",
    "MemoryWriter",
    "linear_input_fn",
    "linear_model",
    "linear_model_fn",
    "linear_optimizer",
    "linear_rows",
]
