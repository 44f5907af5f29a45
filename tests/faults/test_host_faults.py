"""Faults 31, 32, 35 and 36: what goes wrong on the host ends the run with its own error, and is never lost."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from tests.faults.aftermath import fault, verified_steps
from tests.models import make_config, make_spec, make_trainer
from tpuspec import ModeKeys, TPUConfig
from tpuspec.errors import HostCallError, NonFiniteLossError

both_paths = pytest.mark.parametrize("use_tpu", [True, False], ids=["xla", "native"])
STEPS = 12


def batches(count=STEPS):
    return lambda params: [(torch.full((2, 1), float(i)), torch.zeros(2, 1)) for i in range(count)]


def with_host_call(host_call):
    def model_fn(features, labels, mode, params, model, optimizer):
        return make_spec(mode, model(features), labels, optimizer, host_call=(host_call, [features * 1]))

    return model_fn


def run_steps(trainer, verb):
    if verb == "train":
        return trainer.train(batches(), steps=STEPS)
    return trainer.evaluate(batches()) if verb == "evaluate" else list(trainer.predict(batches()))


def start(folder, model_fn, use_tpu=True, **config):
    return make_trainer(folder, model_fn, use_tpu=use_tpu, config=make_config(
        save_checkpoints_steps=2, tpu_config=TPUConfig(iterations_per_loop=2), **config))


@both_paths
@pytest.mark.parametrize("last", [False, True], ids=["on the way", "last step"])
def test_fault_31_an_error_of_metric_fn_names_it_and_the_step(tmp_path, use_tpu, last):
    bad = STEPS - 1 if last else 4

    def metric_fn(x):
        if len(x) and x[0].item() == bad:
            raise KeyError("of the user")
        return {"x": x.squeeze(1)}

    def model_fn(features, labels, mode, params, model, optimizer):
        metrics = {"eval_metrics": (metric_fn, [features * 1])} if mode == ModeKeys.EVAL else {}
        return make_spec(mode, model(features), labels, optimizer, **metrics)

    if use_tpu:
        with fault(HostCallError, f"^metric_fn raised KeyError at step {bad + 1}: 'of the user'") as caught:
            start(tmp_path, model_fn).evaluate(batches())
        assert isinstance(caught.value.__cause__, KeyError)
    else:  # there metric_fn runs within the step, as in as_estimator_spec
        with fault(KeyError, "of the user"):
            start(tmp_path, model_fn, use_tpu).evaluate(batches())


@both_paths
@pytest.mark.parametrize("verb", ["train", "evaluate", "predict"])
@pytest.mark.parametrize("bad", [4, STEPS - 1], ids=["on the way", "last step"])
def test_fault_32_an_error_of_host_call_names_it_and_the_step(tmp_path, use_tpu, verb, bad):
    def host_call(x):
        if x[0].item() == bad:
            raise KeyError("of the user")

    with fault(HostCallError, f"^host_call raised KeyError at step {bad + 1}", "of the user") as caught:
        run_steps(start(tmp_path, with_host_call(host_call), use_tpu), verb)
    assert isinstance(caught.value.__cause__, KeyError)
    if verb == "train":
        # Without XLA host_call is a hook, which comes behind the save of its step.
        assert verified_steps(tmp_path)[-1] <= (bad if use_tpu else bad + 1)


@pytest.mark.parametrize("verb", ["train", "evaluate", "predict"])
def test_fault_32_an_error_behind_a_full_queue_is_raised_and_no_call_is_made_behind_it(tmp_path, verb):
    seen = []

    def host_call(x):
        time.sleep(0.02)
        seen.append(x[0].item())
        if len(seen) == 5:
            raise ValueError("behind a full queue")

    with fault(HostCallError, "^host_call raised ValueError at step 5", "behind a full queue"):
        run_steps(start(tmp_path, with_host_call(host_call), host_queue_size=1), verb)
    assert seen == [0, 1, 2, 3, 4]


class Unpicklable(Exception):
    """Holds a lock, which cannot be sent anywhere."""

    def __init__(self):
        super().__init__("holds a lock")
        self.lock = threading.Lock()


@both_paths
@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_fault_35_a_system_exit_in_host_call_is_not_swallowed(tmp_path, use_tpu, verb):
    def host_call(x):
        if x[0].item() == 3:
            raise SystemExit(5)

    with fault(SystemExit, "^5$") as caught:
        run_steps(start(tmp_path, with_host_call(host_call), use_tpu), verb)
    assert caught.value.code == 5


@both_paths
def test_fault_35_an_error_that_cannot_be_pickled_arrives_whole(tmp_path, use_tpu):
    error = Unpicklable()

    def host_call(x):
        raise error

    with fault(HostCallError, "^host_call raised Unpicklable at step 1", "holds a lock") as caught:
        run_steps(start(tmp_path, with_host_call(host_call), use_tpu), "train")
    assert caught.value.__cause__ is error


@both_paths
def test_fault_36_a_loss_that_is_nan_ends_training_at_its_step_and_the_last_finite_weights_are_kept(tmp_path, use_tpu):
    def model_fn(features, labels, mode, params, model, optimizer):
        spoilt = torch.where(features == 7, features * float("nan"), features * 0)
        return make_spec(mode, model(features * 0 + 1) + spoilt, labels, optimizer)

    with fault(NonFiniteLossError, "^The loss of step 8 is nan"):
        start(tmp_path, model_fn, use_tpu).train(batches(), steps=STEPS)
    saved = verified_steps(tmp_path)
    assert saved[-1] in (4, 6)
    weight = make_trainer(tmp_path, model_fn).get_variable_value("weight")
    assert torch.isfinite(torch.from_numpy(weight)).all()
