"""After a run that failed, the next Trainer of the process trains right, and is captured."""

from __future__ import annotations

import pytest
import torch

import tpuspec
from tests.regression import make_trainer, regression_fn, rows_input
from tpuspec import SessionRunHook
from tpuspec.errors import HostCallError


class Stop(BaseException):
    pass


def failing(where, error):
    """Returns a model_fn and hooks that raise at the fourth call of one part of the run."""
    calls = []

    def fail(*_):
        calls.append(0)
        if len(calls) == 4:
            raise error

    def model_fn(features, labels, mode, params, model, optimizer, global_step):
        if where == "model_fn":
            fail()
        spec = regression_fn(features, labels, mode, params, model, optimizer, global_step)
        if where == "host_call":
            return tpuspec.TPUEstimatorSpec(mode, loss=spec.loss, train_op=spec.train_op,
                                            host_call=(lambda step: fail(), [global_step]))
        if where == "train_op":
            def train_op():
                spec.loss.backward()
                fail()
                tpuspec.CrossShardOptimizer(optimizer).step()

            return tpuspec.TPUEstimatorSpec(mode, loss=spec.loss, train_op=train_op)
        return spec

    class Hook(SessionRunHook):
        def after_run(self, context):
            if where == "hook":
                fail()

    return model_fn, [Hook()]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("expected"), use_tpu=False)
    trainer.train(rows_input(), steps=20)
    return trainer._sessions[False].model_state()


@pytest.mark.parametrize("error", [ValueError("own"), KeyboardInterrupt("own")], ids=["error", "interrupt"])
@pytest.mark.parametrize("where", ["model_fn", "train_op", "hook", "host_call"])
def test_the_next_trainer_after_a_failed_run_trains_right_and_is_captured(tmp_path, where, error, expected):
    model_fn, hooks = failing(where, error)
    failed = make_trainer(tmp_path / "failed", model_fn)
    with pytest.raises((type(error), HostCallError)) as caught:
        failed.train(rows_input(), steps=20, hooks=hooks)
    trainer = make_trainer(tmp_path / "next", capture="require")
    trainer.train(rows_input(), steps=20)
    assert trainer._sessions[True].backend.step_kind == "replay"
    for name, value in trainer._sessions[True].model_state().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
    assert caught.value is not None  # kept until here, as a notebook keeps the last error
