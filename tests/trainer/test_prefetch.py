"""A slow input is drawn ahead; what the Trainer computes, raises and leaves behind is as without."""

import threading
import time

import pytest
import torch

import tpuspec
from tests.models import BATCH_SIZE, VERBS, make_config, make_trainer, run
from tpuspec import ModeKeys
from tpuspec.errors import ConfigError


def slow_batches(mode, *, num_batches=60, error_at=None):
    generator = torch.Generator().manual_seed(3)
    for i in range(num_batches):
        time.sleep(0.0005)
        if i == error_at:
            raise ZeroDivisionError("of the user")
        x = torch.rand(BATCH_SIZE, 1, generator=generator)
        yield x if mode == ModeKeys.PREDICT else (x, 2 * x)


def slow_input(params, mode):
    return slow_batches(mode)


def input_threads():
    return [thread.name for thread in threading.enumerate() if thread.name == "tpuspec-input"]


class SeenThreads(tpuspec.SessionRunHook):
    def __init__(self):
        self.seen = []

    def after_run(self, context):
        self.seen += input_threads()


def trainer_with(tmp_path, prefetch_batches, **config):
    return make_trainer(tmp_path / str(prefetch_batches), config=make_config(
        prefetch_batches=prefetch_batches, tpu_config=tpuspec.TPUConfig(iterations_per_loop=10), **config))


def test_weights_are_those_of_a_run_without_prefetch(tmp_path):
    seen = SeenThreads()
    weights = {}
    for prefetch_batches, hooks in ((0, []), (2, [seen])):
        trainer = trainer_with(tmp_path, prefetch_batches, save_checkpoints_steps=100)
        trainer.train(slow_input, hooks=hooks, max_steps=40)
        weights[prefetch_batches] = [trainer.get_variable_value(name).tolist() for name in ("weight", "bias")]
    assert weights[0] == weights[2]
    assert seen.seen, "the input was slow enough to be drawn ahead"
    assert not input_threads()


@pytest.mark.parametrize("verb", VERBS)
def test_an_error_of_a_slow_input_is_that_error(verb, tmp_path):
    trainer = trainer_with(tmp_path, 2)
    with pytest.raises(ZeroDivisionError, match="of the user"):
        if verb == "train":
            trainer.train(lambda params, mode: slow_batches(mode, error_at=30), max_steps=50)
        else:
            run(trainer, verb, lambda params, mode: slow_batches(mode, error_at=30))
    assert not input_threads()
    if verb == "train":
        assert trainer.global_step() == 30


def test_no_thread_is_left_by_a_prediction_that_is_closed_early(tmp_path):
    predictions = trainer_with(tmp_path, 2).predict(slow_input)
    for _ in range(25 * BATCH_SIZE):
        next(predictions)
    predictions.close()
    assert not input_threads()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_no_thread_is_left_by_a_training_that_a_hook_ends(error, tmp_path):
    class Ends(SeenThreads):
        def after_run(self, context):
            super().after_run(context)
            if self.seen:
                raise error

    with pytest.raises(error):
        trainer_with(tmp_path, 2).train(slow_input, hooks=[Ends()], max_steps=50)
    assert not input_threads()


def test_the_input_of_a_training_rests_while_an_evaluation_interrupts_it(tmp_path):
    """It would draw with the random state of the evaluation."""
    evaluating, drawn_meanwhile, drawn = threading.Event(), [], []

    def train_input(params):
        for i in range(200):
            time.sleep(0.002)
            (drawn_meanwhile if evaluating.is_set() else drawn).append(i)
            yield torch.ones(BATCH_SIZE, 1), torch.zeros(BATCH_SIZE, 1)

    def eval_input(params):
        evaluating.set()
        for _ in range(3):
            time.sleep(0.01)
            yield torch.ones(BATCH_SIZE, 1), torch.zeros(BATCH_SIZE, 1)
        evaluating.clear()

    class Evaluates(SeenThreads):
        def after_run(self, context):
            super().after_run(context)
            trainer.evaluate(eval_input)

    hook = Evaluates()
    trainer = trainer_with(tmp_path, 100)
    trainer.train(train_input, hooks=[hook], max_steps=40)
    assert hook.seen and len(drawn) > 40, "it was drawn ahead"
    assert drawn_meanwhile == []


@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_prefetch_batches_is_a_count(value):
    with pytest.raises(ConfigError, match="prefetch_batches must be an int, 0 for none"):
        tpuspec.RunConfig(prefetch_batches=value)
