"""What a step of plain PyTorch gives to host functions."""

from __future__ import annotations

import pytest
import torch
import torchmetrics

from tpuspec import HookContext, ModeKeys, TPUEstimatorSpec
from tpuspec.loops.step import _native_functions
from tpuspec.spec.estimator_spec import EstimatorSpec


@pytest.fixture(scope="module")
def on_device():
    """A tensor of a device that is not the host's; without a GPU, XLA's has to do."""
    import torch_xla

    return torch.arange(3.0).to("cuda" if torch.cuda.is_available() else torch_xla.device())


def test_host_functions_get_the_hosts_tensors_wherever_the_step_computes(on_device):
    seen = []

    def metric_fn(x):
        seen.append(x)
        metric = torchmetrics.MeanMetric()
        metric.update(x)
        return {"mean": metric}

    spec = TPUEstimatorSpec(ModeKeys.EVAL, loss=on_device.sum(), eval_metrics=(metric_fn, [on_device]),
                            host_call=(lambda x: seen.append(x), {"x": on_device}))
    functions = _native_functions(spec, ModeKeys.EVAL)
    assert functions.eval_metric_ops["mean"].compute() == 1.0
    functions.hooks[0].after_run(HookContext(mode=ModeKeys.EVAL, model=None))
    assert [x.device.type for x in seen] == ["cpu", "cpu"]
    assert [x.tolist() for x in seen] == [[0.0, 1.0, 2.0]] * 2


def test_updates_of_an_estimator_spec_come_to_the_host_too(on_device):
    metric = torchmetrics.MeanMetric()
    spec = EstimatorSpec(ModeKeys.EVAL, loss=on_device.sum(), eval_metric_ops={"mean": (metric, (on_device,))})
    found, update = _native_functions(spec, ModeKeys.EVAL).eval_metric_ops["mean"]
    assert found is metric
    assert update[0].device.type == "cpu"


def test_the_hosts_own_tensors_are_passed_as_they_are():
    tensor, seen = torch.ones(2), []
    spec = TPUEstimatorSpec(ModeKeys.EVAL, loss=tensor.sum(), eval_metrics=(lambda x: seen.append(x) or {}, [tensor]))
    _native_functions(spec, ModeKeys.EVAL)
    assert seen[0].data_ptr() == tensor.data_ptr()
