"""Errors that say the memory is full get a note with a batch size to try."""

from __future__ import annotations

import pytest
import torch

from tpuspec.errors import DeviceError, HostCallError
from tpuspec.loops.memory import explain_out_of_memory
from tpuspec.spec.mode import ModeKeys

SIZES = {ModeKeys.TRAIN: 64, ModeKeys.EVAL: None, ModeKeys.PREDICT: 6}


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("Bad StatusOr access: RESOURCE_EXHAUSTED: Out of memory allocating 36357251612672 bytes."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    DeviceError("the outputs of step 4 could not be brought from the device: RuntimeError: RESOURCE_EXHAUSTED: ..."),
    caused(HostCallError("host_call raised MemoryError at step 3: "), MemoryError()),
], ids=["python", "cuda", "xla", "cpu", "device", "host_call"])
def test_fault_38_an_error_of_full_memory_suggests_a_batch_size(error):
    explain_out_of_memory(error, "train", SIZES, 4)
    assert error.__notes__ == [
        "The memory is full: lower train_batch_size=64, to 32 for example, or let minimize(accumulate_steps=...) add "
        "up the gradients of smaller batches."]


@pytest.mark.parametrize(("verb", "replicas", "note"), [
    ("evaluate", 1, "The memory is full: lower eval_batch_size."),
    ("predict", 3, "The memory is full: lower predict_batch_size=6, to 3 for example.")])
def test_fault_38_the_setting_is_that_of_the_call_and_the_size_divisible(verb, replicas, note):
    error = MemoryError()
    explain_out_of_memory(error, verb, SIZES, replicas)
    assert error.__notes__ == [note]


@pytest.mark.parametrize(("error", "verb"), [(ValueError("no"), "train"), (MemoryError(), "export")])
def test_others_are_left_alone(error, verb):
    explain_out_of_memory(error, verb, SIZES, 1)
    assert not hasattr(error, "__notes__")
