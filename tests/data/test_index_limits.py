"""Labels and ids that are out of range: an error on XLA too, where plain PyTorch raises IndexError."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.regression import make_trainer
from tpuspec import CrossShardOptimizer, ModeKeys, TPUEstimatorSpec
from tpuspec.data.index_limits import IndexLimits
from tpuspec.errors import InputError
from tpuspec.spec.results import Batch

TABLE = torch.arange(10.0).reshape(5, 2)

USES = {
    "cross_entropy": lambda y: F.cross_entropy(torch.zeros(4, 5), y),
    "nn.CrossEntropyLoss": lambda y: nn.CrossEntropyLoss()(torch.zeros(4, 5), y),
    "nll_loss": lambda y: F.nll_loss(torch.zeros(4, 5), y.long()),
    "embedding": lambda y: F.embedding(y, TABLE),
    "nn.Embedding": lambda y: nn.Embedding(5, 2)(y.reshape(2, 2)[:, 1:]),
    "one_hot": lambda y: F.one_hot(y, 5),
    "gather": lambda y: torch.gather(torch.zeros(4, 5), 1, y.unsqueeze(1)),
    "a method": lambda y: TABLE.index_select(0, y.view(-1)),
    "indexing": lambda y: TABLE[y],
    "indexing behind a slice": lambda y: torch.zeros(4, 5)[:, y],
    "a chunk": lambda y: F.embedding(y.chunk(2)[1], TABLE),
    "in place": lambda y: torch.zeros(4, 5).scatter_(1, y[:, None], 1.0),
    "a float": lambda y: F.embedding(y.float().to(torch.int32), TABLE),
}
NOT_CHECKED = {
    "clamped": lambda y: F.embedding(y.clamp(0, 4), TABLE),
    "masked": lambda y: F.embedding(torch.where(y > 4, 0, y), TABLE),
    "a remainder": lambda y: F.one_hot(y % 5, 5),
    "a regression": lambda y: F.mse_loss(y.float(), torch.zeros(4)),
    "written in place": lambda y: F.embedding(write(y), TABLE),
    "clamped in place": lambda y: F.embedding(y.view(2, 2).clamp_(0, 4), TABLE),
    "another part": lambda y: F.embedding(y[:3], TABLE),
}


def write(y):
    y[y > 4] = 0
    return y


def limits_of(use, y):
    limits = IndexLimits()
    with limits.observe(Batch(features={"x": torch.ones(4)}, labels=y)):
        use(y)
    return limits


def batch(*values):
    return Batch(features={"x": torch.ones(4)}, labels=torch.tensor(values))


@pytest.mark.parametrize("use", USES)
def test_what_plain_pytorch_refuses_is_refused_by_name(use):
    good, bad = batch(0, 1, 4, 3), batch(0, 1, 4, 5)
    limits = limits_of(USES[use], good.labels)
    limits.check([good])
    with pytest.raises((IndexError, RuntimeError)):
        USES[use](bad.labels)
    with pytest.raises(InputError, match=r"labels hold 5, at .*test_index_limits.py:\d+.*(0|-5) to 4"):
        limits.check([good, bad])


@pytest.mark.parametrize("use", NOT_CHECKED)
def test_what_plain_pytorch_takes_is_taken(use):
    limits = limits_of(NOT_CHECKED[use], batch(0, 1, 4, 3).labels)
    for values in (0, 1, 4, 5), (0, 1, 4, 99):
        NOT_CHECKED[use](batch(*values).labels)
        limits.check([batch(*values)])


def test_ignore_index_and_negative_indices_are_taken():
    limits = limits_of(USES["cross_entropy"], batch(0, 1, 2, 3).labels)
    limits.check([batch(0, -100, 4, 3)])
    with pytest.raises(InputError, match="hold -1, at .* 0 to 4, or -100"):
        limits.check([batch(0, -100, -1, 3)])
    limits_of(USES["indexing"], batch(0, 1, 2, 3).labels).check([batch(-5, 0, 4, 1)])
    with pytest.raises(InputError, match="hold -6"):
        limits_of(USES["indexing"], batch(0, 1, 2, 3).labels).check([batch(-6, 0, 4, 1)])


def model_fn(features, labels, mode, params, model, optimizer):
    logits = model(features["ids"])
    if mode == ModeKeys.PREDICT:
        return TPUEstimatorSpec(mode, predictions={"logits": logits})
    losses = F.cross_entropy(logits, labels, reduction="none")
    if mode == ModeKeys.EVAL:
        return TPUEstimatorSpec(mode, loss=losses)
    loss = losses.mean()
    return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss))


def inputs(bad_ids=None, bad_labels=None, mode=ModeKeys.TRAIN):
    """Six batches; the fifth holds what is bad."""
    for number in range(6):
        ids, labels = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 0])
        if number == 4:
            ids[2] = ids[2] if bad_ids is None else bad_ids
            labels[1] = labels[1] if bad_labels is None else bad_labels
        yield {"ids": ids} if mode == ModeKeys.PREDICT else ({"ids": ids}, labels)


def trainer_of(tmp_path, **arguments):
    return make_trainer(tmp_path, model_fn, model=lambda params: nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3)),
                        **arguments)


def test_training_evaluation_and_prediction_name_tensor_value_and_line(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train(lambda params: inputs(), steps=6)
    with pytest.raises(InputError, match=r"features\['ids'\] hold 7, at \[2\].*embedding at test_index_limits.py:"):
        trainer.train(lambda params: inputs(bad_ids=7), steps=6)
    assert trainer._sessions[True].global_step == 10
    with pytest.raises(InputError, match=r"labels hold -3, at \[1\].*cross_entropy at test_index_limits.py:"):
        trainer.evaluate(lambda params: inputs(bad_labels=-3))
    with pytest.raises(InputError, match=r"features\['ids'\] hold 100"):
        list(trainer.predict(lambda params: inputs(bad_ids=100, mode=ModeKeys.PREDICT)))


def test_the_first_batch_is_checked_before_anything_is_compiled(tmp_path):
    def first_bad(params):
        yield {"ids": torch.tensor([0, 9, 1, 1])}, torch.tensor([0, 1, 2, 0])

    trainer = trainer_of(tmp_path)
    with pytest.raises(InputError, match="hold 9"):
        trainer.train(first_bad, steps=3)
    assert trainer._sessions[True].global_step == 0


def test_plain_pytorch_says_it_itself(tmp_path):
    with pytest.raises(IndexError, match="out of range"):
        trainer_of(tmp_path, use_tpu=False).train(lambda params: inputs(bad_ids=7), steps=6)
