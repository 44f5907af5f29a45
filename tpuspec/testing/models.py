"""A tiny linear regression: module, optimizer, model_fn, rows and input_fn, for tests of what stands around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tpuspec.spec.estimator_spec import TPUEstimatorSpec
from tpuspec.spec.mode import ModeKeys
from tpuspec.spec.train_op import CrossShardOptimizer

NUM_FEATURES = 3


def linear_model(params: Mapping[str, Any]) -> nn.Linear:
    """Returns a Linear [3] -> [1] with weights 0, so that every build is equal; params are not read."""
    model = nn.Linear(NUM_FEATURES, 1)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def linear_optimizer(model: nn.Module, params: Mapping[str, Any]) -> torch.optim.SGD:
    """Returns SGD with params['learning_rate'], 0.1 where there is none."""
    return torch.optim.SGD(model.parameters(), lr=params.get("learning_rate", 0.1))


def linear_model_fn(features: Tensor, labels: Tensor | None, mode: str, params: Mapping[str, Any], model: nn.Module,
                    optimizer: torch.optim.Optimizer | None) -> TPUEstimatorSpec:
    """Returns the spec of one step: the squared error, per example in EVAL, its metric 'error', predictions 'output'.

    Args:
      features: [batch, 3].
      labels: [batch, 1]; None in PREDICT.
      mode: a ModeKeys value.
      params: not read; the Trainer wants the argument.
      model: a linear_model.
      optimizer: needed in TRAIN.
    """
    output = model(features)
    if mode == ModeKeys.PREDICT:
        return TPUEstimatorSpec(mode=mode, predictions={"output": output})
    assert labels is not None, "linear_input_fn yields labels in TRAIN and EVAL"
    errors = (output - labels).square().squeeze(1)
    if mode == ModeKeys.EVAL:
        return TPUEstimatorSpec(mode=mode, loss=errors, eval_metrics=(lambda error: {"error": error}, [errors]))
    assert optimizer is not None, "the Trainer passes one in TRAIN"
    loss = errors.mean()
    return TPUEstimatorSpec(mode=mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss))


def linear_rows(num_rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns features [num_rows, 3] and labels [num_rows, 1], exactly linear in them; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_rows, NUM_FEATURES, generator=generator)
    return features, features @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.25


def linear_input_fn(num_rows: int, seed: int = 0) -> Callable[..., TensorDataset]:
    """Returns an input_fn over linear_rows, as a Dataset, which tpuspec batches."""
    def input_fn(params: Mapping[str, Any]) -> TensorDataset:
        return TensorDataset(*linear_rows(num_rows, seed))

    return input_fn
