"""Host memory of batches is used again, and never while anybody holds it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tpuspec.engine.arrays import Buffers

FEATURES, LABELS = torch.arange(6.0).reshape(2, 3), torch.tensor([1, 2])


def test_a_copy_has_the_values_and_is_its_own():
    source = FEATURES.clone()
    (copy,) = Buffers().copies([source])
    source.zero_()
    assert copy.tolist() == FEATURES.tolist() and copy.dtype == np.float32


def test_memory_is_used_again_once_nobody_holds_it():
    buffers = Buffers()
    first = buffers.copies([FEATURES, LABELS])
    places = [array.ctypes.data for array in first]
    del first
    assert [array.ctypes.data for array in buffers.copies([FEATURES, LABELS])] == places


@pytest.mark.parametrize("hold", [
    lambda array: array, lambda array: array[1:], lambda array: array[0].reshape(3, 1), torch.from_numpy, memoryview,
    lambda array: torch.from_numpy(array)[0]], ids=["array", "rows", "view of a view", "tensor", "buffer", "row"])
def test_memory_that_is_held_keeps_its_values(hold):
    buffers = Buffers()
    held = hold(buffers.copies([FEATURES])[0])
    before = np.asarray(held).tolist()
    for value in range(100):
        buffers.copies([torch.full_like(FEATURES, -value)])
    assert np.asarray(held).tolist() == before


def test_a_program_has_the_values_that_it_was_started_with():
    import jax

    buffers, add = Buffers(), jax.jit(lambda x, total: total + x)
    total = jax.numpy.zeros((2, 3))
    for value in range(200):
        total = add(buffers.copies([torch.full((2, 3), float(value))])[0], total)
    assert np.array_equal(np.array(total), np.full((2, 3), sum(range(200))))


def test_large_memory_is_not_kept():
    buffers, large = Buffers(), torch.zeros(1 << 17)
    buffers.copies([large])
    assert not any(buffers._kept.values())


def test_tensors_with_a_gradient_a_conjugate_or_a_negative_view_are_copied_as_what_they_are():
    complex_ = torch.tensor([1 + 2j])
    given = [FEATURES.clone().requires_grad_(), complex_.conj(), complex_.conj().imag]
    copies = Buffers().copies(given)
    assert [copy.tolist() for copy in copies] == [tensor.detach().resolve_conj().resolve_neg().tolist()
                                                 for tensor in given]


def test_the_batches_of_several_steps_are_one_array():
    steps = [[FEATURES * i, LABELS + i] for i in range(3)]
    stacks = Buffers().stacks(steps)
    assert stacks is not None
    assert [stack.shape for stack in stacks] == [(3, 2, 3), (3, 2)]
    assert all(torch.equal(torch.from_numpy(stack[i]), tensor)
               for i, step in enumerate(steps) for stack, tensor in zip(stacks, step, strict=True))


def test_numpy_lacks_bfloat16_and_stacks_none():
    assert Buffers().stacks([[FEATURES.bfloat16()]] * 2) is None
