from __future__ import annotations

import torch

from tpuspec.native import gradients
from tpuspec.native.gradients import sum_gradients


def parameters(*grads):
    made = []
    for grad in grads:
        value = torch.zeros(2) if grad is None else torch.zeros_like(grad)
        made.append(torch.nn.Parameter(value))
        made[-1].grad = None if grad is None else grad.clone()
    return made


def together(*processes, scale=1.0):
    """Sums as processes do that all have the sum of all messages; returns the first one's parameters."""
    messages = []
    for own in processes[1:]:
        sent: list[torch.Tensor] = []
        sum_gradients(parameters(*own), lambda flat, sent=sent: sent.append(flat.clone()), scale=scale)
        messages.append(sent)
    first, number = parameters(*processes[0]), iter(range(1000))

    def all_reduce(flat):
        i = next(number)
        for sent in messages:
            flat += sent[i]

    sum_gradients(first, all_reduce, scale=scale)
    return first


def test_the_mean_is_the_sum_over_processes_times_the_scale():
    first, second = together(
        [torch.tensor([1.0, 2.0]), torch.tensor(4.0)], [torch.tensor([3.0, 6.0]), torch.tensor(8.0)], scale=0.5)
    assert first.grad.tolist() == [2.0, 4.0]
    assert second.grad.item() == 6.0


def test_a_gradient_that_one_process_lacks_counts_as_zeros_there():
    (parameter,) = together([None], [torch.tensor([3.0, 6.0])], scale=0.5)
    assert parameter.grad.tolist() == [1.5, 3.0]


def test_a_gradient_that_all_lack_stays_away():
    first, second = together([None, torch.ones(2)], [None, torch.ones(2)])
    assert first.grad is None
    assert second.grad.tolist() == [2.0, 2.0]


def test_each_dtype_and_every_full_bucket_is_a_message_of_its_own(monkeypatch):
    monkeypatch.setattr(gradients, "_BUCKET_BYTES", 32)
    sizes: list[tuple[torch.dtype, int]] = []
    given = parameters(torch.ones(4), torch.ones(4), torch.ones(4), torch.ones(3, dtype=torch.float64))
    sum_gradients(given, lambda flat: sizes.append((flat.dtype, flat.numel())), scale=1.0)
    # Two of 16 bytes fill a bucket; one number more a parameter says whether it has a gradient.
    assert sizes == [(torch.float32, 10), (torch.float32, 5), (torch.float64, 4)]


def test_nothing_is_sent_for_an_optimizer_without_parameters():
    sum_gradients([], lambda flat: 1 / 0, scale=1.0)


def test_halves_are_summed_as_float32_and_keep_their_dtype():
    sent = []
    grads = [torch.tensor([256.0, 1.0], dtype=torch.bfloat16), None]
    made = parameters(*grads)
    made[1].data = made[1].data.bfloat16()

    def all_reduce(flat):
        sent.append(flat.dtype)
        flat *= 3

    sum_gradients(made, all_reduce, scale=1 / 3)
    assert sent == [torch.float32]
    assert made[0].grad.dtype is torch.bfloat16
    assert made[0].grad.tolist() == [256.0, 1.0]
    assert made[1].grad is None
