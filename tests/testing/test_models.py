import pytest
import torch

from tpuspec.spec.mode import ModeKeys
from tpuspec.testing import linear_input_fn, linear_model, linear_model_fn, linear_optimizer, linear_rows


def spec_of(mode, model, optimizer=None):
    features, labels = linear_rows(64)
    return linear_model_fn(features, None if mode is ModeKeys.PREDICT else labels, mode, {}, model, optimizer)


def test_training_reaches_the_line_that_the_rows_lie_on():
    model = linear_model({})
    optimizer = linear_optimizer(model, {"learning_rate": 0.3})
    for _ in range(200):
        spec_of(ModeKeys.TRAIN, model, optimizer).train_op.run(0)
    assert model.weight.tolist()[0] == pytest.approx([1.0, -2.0, 0.5], abs=1e-3)
    assert model.bias.item() == pytest.approx(0.25, abs=1e-3)


def test_every_build_has_the_same_weights():
    first, second = linear_model({}).state_dict(), linear_model({"width": 3}).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_loss_of_an_evaluation_is_per_example_and_its_metric_the_same():
    spec = spec_of(ModeKeys.EVAL, linear_model({}))
    metric_fn, tensors = spec.eval_metrics
    assert spec.loss.shape == (64,)
    assert metric_fn(*tensors)["error"] is spec.loss


def test_predictions_are_named():
    assert spec_of(ModeKeys.PREDICT, linear_model({})).predictions["output"].shape == (64, 1)


def test_rows_depend_on_the_seed_alone():
    before = torch.get_rng_state()
    assert torch.equal(linear_rows(5)[0], linear_rows(5)[0])
    assert not torch.equal(linear_rows(5)[0], linear_rows(5, seed=1)[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_input_is_a_dataset_of_all_rows():
    dataset = linear_input_fn(7)(params={})
    assert len(dataset) == 7
    assert torch.equal(dataset[3][1], linear_rows(7)[1][3])
