"""Rows SIG-01 .. SIG-14 of the conformance list: what model_fn and input_fn may take, return and yield."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics import MeanMetric

from tests.models import (
    VERBS,
    input_fn,
    make_config,
    make_spec,
    make_trainer,
    model_fn,
    run,
)
from tpuspec import EstimatorSpec, InputPipelineConfig, ModeKeys, RunConfig, SessionRunHook, TPUConfig
from tpuspec.data.context import InputContext, TPUContext
from tpuspec.data.deployment import plan_input
from tpuspec.data.pipeline import InputPipeline, InputSettings
from tpuspec.spec.backend import Topology

MODE_OF = {"train": ModeKeys.TRAIN, "evaluate": ModeKeys.EVAL, "predict": ModeKeys.PREDICT}
ROWS_OF = {"train": 2, "evaluate": 4, "predict": 4}

both_paths = pytest.mark.parametrize("use_tpu", [True, False], ids=["xla", "native"])
every_verb = pytest.mark.parametrize("verb", VERBS)


def ones_and_zeros():
    return torch.ones(2, 1), torch.zeros(2, 1)


def watched(seen, **fields):
    """A model_fn that notes its arguments."""
    def watched_model_fn(features, labels, mode, params, config, model, optimizer, global_step):
        seen.append(SimpleNamespace(features=features, labels=labels, mode=mode, params=params, config=config,
                                    model=model, optimizer=optimizer, global_step=global_step))
        leaves = torch.utils._pytree.tree_leaves(features)
        return make_spec(mode, model(leaves[0].float()), labels if isinstance(labels, torch.Tensor) else None,
                         optimizer, **fields)

    return watched_model_fn


# SIG-01

@both_paths
@every_verb
def test_sig_01_an_input_fn_without_params_is_a_value_error(tmp_path, verb, use_tpu):
    def no_params(mode):
        raise AssertionError("called without params")

    match = (r"input_fn \(.*no_params\) does not include params argument, required by TPUEstimator to pass batch size "
             r'as params\["batch_size"\]')
    with pytest.raises(ValueError, match=match):
        run(make_trainer(tmp_path, use_tpu=use_tpu), verb, no_params)


@both_paths
@every_verb
def test_sig_01_input_fn_gets_mode_config_and_input_context_where_it_names_them(tmp_path, verb, use_tpu):
    seen = {}

    def takes_all(input_context, config, mode, params):
        seen.update(input_context=input_context, config=config, mode=mode, params=params)
        return input_fn(params)

    trainer = make_trainer(tmp_path, use_tpu=use_tpu)
    run(trainer, verb, takes_all)
    assert seen["mode"] is MODE_OF[verb]
    assert isinstance(seen["config"], RunConfig)
    assert seen["config"] == trainer.config
    assert seen["input_context"] == InputContext(
        num_input_pipelines=1, input_pipeline_id=0, num_replicas_in_sync=1)
    assert seen["params"]["batch_size"] == 2


@pytest.mark.parametrize("name", ["mode", "config", "input_context"])
def test_sig_01_input_fn_gets_no_argument_that_it_does_not_name(tmp_path, name):
    seen = []
    code = f"def takes_one(params, {name}):\n    seen.append({name})\n    return input_fn(params)\n"
    names = {"seen": seen, "input_fn": input_fn}
    exec(code, names)
    run(make_trainer(tmp_path, use_tpu=False), "evaluate", names["takes_one"])
    assert len(seen) == 1


# SIG-02

class Functions:
    """model_fn and input_fn as bound methods."""

    def model_fn(self, features, labels, mode, params, model, optimizer):
        return model_fn(features, labels, mode, params, model, optimizer)

    def input_fn(self, params):
        return input_fn(params)


class CallableModelFn:
    """model_fn as an object, its arguments in another order."""

    def __call__(self, optimizer, model, params, mode, labels, features):
        return model_fn(features, labels, mode, params, model, optimizer)


class CallableInputFn:
    """input_fn as an object."""

    def __call__(self, mode, params):
        return input_fn(params)


def scaled_model_fn(scale, features, labels, mode, params, model, optimizer):
    return make_spec(mode, model(features) * scale, labels, optimizer)


def sized_input_fn(num_rows, params, mode):
    return TensorDataset(torch.ones(num_rows, 1), torch.zeros(num_rows, 1))


MODEL_FNS = {
    "function": model_fn,
    "method": Functions().model_fn,
    "object": CallableModelFn(),
    "partial by position": functools.partial(scaled_model_fn, 2.0),
    "partial by keyword": functools.partial(scaled_model_fn, scale=2.0),
    "lambda": lambda optimizer, model, params, mode, labels, features: model_fn(
        features, labels, mode, params, model, optimizer),
}
INPUT_FNS = {
    "function": input_fn,
    "method": Functions().input_fn,
    "object": CallableInputFn(),
    "partial by position": functools.partial(sized_input_fn, 4),
    "partial by keyword": functools.partial(sized_input_fn, num_rows=4),
    "lambda": lambda mode, params: input_fn(params),
}


@pytest.mark.parametrize("kind", MODEL_FNS)
@both_paths
def test_sig_02_any_callable_is_a_model_fn_and_its_arguments_come_by_name(tmp_path, kind, use_tpu):
    trainer = make_trainer(tmp_path, MODEL_FNS[kind], use_tpu=use_tpu)
    assert trainer.train(input_fn, steps=1).global_step() == 1
    assert trainer.evaluate(input_fn)["loss"] >= 0
    assert len(list(trainer.predict(input_fn))) == 4


@pytest.mark.parametrize("kind", INPUT_FNS)
@both_paths
def test_sig_02_any_callable_is_an_input_fn_and_its_arguments_come_by_name(tmp_path, kind, use_tpu):
    trainer = make_trainer(tmp_path, use_tpu=use_tpu)
    assert len(list(trainer.predict(INPUT_FNS[kind]))) == 4


def test_sig_02_nothing_is_passed_by_way_of_kwargs(tmp_path):
    seen = []

    def takes_kwargs(features, mode, params, model, **kwargs):
        seen.append(kwargs)
        return make_spec(mode, model(features), None, None)

    def input_takes_kwargs(params, **kwargs):
        seen.append(kwargs)
        return input_fn(params)

    list(make_trainer(tmp_path, takes_kwargs).predict(input_takes_kwargs))
    assert seen
    assert all(kwargs == {} for kwargs in seen)


def test_sig_02_kwargs_are_not_seen_as_labels(tmp_path):
    def takes_kwargs(features, mode, params, model, **kwargs):
        return make_spec(mode, model(features), None, None)

    with pytest.raises(ValueError, match="does not take labels"):
        make_trainer(tmp_path, takes_kwargs).evaluate(input_fn)


def test_sig_02_keyword_only_arguments_are_matched_by_name_too(tmp_path):
    def keyword_only(features, *, labels, mode, params, model, optimizer):
        return model_fn(features, labels, mode, params, model, optimizer)

    # What a partial leaves behind a keyword that it binds is keyword-only as well.
    def input_keyword_only(*, params, mode):
        return input_fn(params)

    assert make_trainer(tmp_path, keyword_only).train(input_keyword_only, steps=1).global_step() == 1


# SIG-03

@both_paths
@pytest.mark.parametrize(("extra", "shown"), [
    (["optimiser"], r"\['optimiser'\].*Did you mean 'optimizer'\?"), (["x", "y"], r"\['x', 'y'\]")])
def test_sig_03_an_unknown_argument_of_model_fn_is_a_value_error_at_construction(tmp_path, use_tpu, extra, shown):
    names = {}
    exec(f"def extra_fn(features, labels, mode, params, {', '.join(extra)}): pass", names)
    with pytest.raises(ValueError, match=rf"model_fn \(extra_fn\) has following not expected args: {shown}"):
        make_trainer(tmp_path, names["extra_fn"], use_tpu=use_tpu)


def test_sig_03_an_unknown_argument_with_a_default_is_a_value_error_too(tmp_path):
    def misspelt(features, label=None, mode=None, params=None):
        raise AssertionError("called, though label would always be None")

    with pytest.raises(ValueError, match=r"has following not expected args: \['label'\].*Did you mean 'labels'\?"):
        make_trainer(tmp_path, misspelt)


@both_paths
def test_sig_03_a_model_fn_without_features_is_a_value_error_at_construction(tmp_path, use_tpu):
    def no_features(x, labels, mode, params):
        raise AssertionError("called without features")

    with pytest.raises(ValueError, match=r"model_fn \(.*no_features\) must include features argument"):
        make_trainer(tmp_path, no_features, use_tpu=use_tpu)


def test_sig_03_self_of_a_method_given_as_a_plain_function_is_not_unexpected(tmp_path):
    assert make_trainer(tmp_path, functools.partial(Functions.model_fn, Functions())).params == {}


# SIG-04

def no_params_fn(features, labels, mode, model, optimizer):
    raise AssertionError("called without params")


@both_paths
@pytest.mark.parametrize("params", [{}, {"width": 1}])
def test_sig_04_params_given_to_a_model_fn_that_takes_none_are_a_value_error_at_construction(
        tmp_path, use_tpu, params):
    with pytest.raises(ValueError, match="does not include params argument, but params are passed"):
        make_trainer(tmp_path, no_params_fn, use_tpu=use_tpu, params=params)


@both_paths
@every_verb
def test_sig_04_without_params_given_a_model_fn_that_takes_none_is_a_value_error_when_it_is_used(
        tmp_path, use_tpu, verb):
    trainer = make_trainer(tmp_path, no_params_fn, use_tpu=use_tpu, params=None)
    match = r"model_fn \(no_params_fn\) does not include params argument, required by TPUEstimator"
    with pytest.raises(ValueError, match=match):
        run(trainer, verb)


# SIG-05

def no_labels_fn(features, mode, params, model, optimizer):
    labels = features.pop("y") if isinstance(features, dict) else None
    return make_spec(mode, model(features["x"] if isinstance(features, dict) else features), labels, optimizer)


@both_paths
@every_verb
def test_sig_05_model_fn_may_omit_labels_where_the_input_has_none(tmp_path, use_tpu, verb):
    trainer = make_trainer(tmp_path, no_labels_fn, use_tpu=use_tpu)
    run(trainer, verb, lambda params: [torch.ones(2, 1)] * 2)


@both_paths
@every_verb
def test_sig_05_labels_can_be_popped_out_of_features_at_every_step(tmp_path, use_tpu, verb):
    trainer = make_trainer(tmp_path, no_labels_fn, use_tpu=use_tpu)
    run(trainer, verb, lambda params: [{"x": torch.ones(2, 1), "y": torch.zeros(2, 1)}] * 2)


@both_paths
@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_sig_05_labels_need_a_labels_argument(tmp_path, use_tpu, verb):
    trainer = make_trainer(tmp_path, no_labels_fn, use_tpu=use_tpu)
    match = r"model_fn \(no_labels_fn\) does not take labels, but input_fn returns labels\."
    with pytest.raises(ValueError, match=match):
        run(trainer, verb)


def test_sig_05_labels_that_are_not_taken_are_reported_before_missing_params(tmp_path):
    def features_only(features):
        raise AssertionError("called without labels")

    trainer = make_trainer(tmp_path, features_only, params=None)
    with pytest.raises(ValueError, match="does not take labels, but input_fn returns labels"):
        trainer.train(input_fn, steps=1)
    with pytest.raises(ValueError, match="does not include params argument"):
        trainer.train(lambda params: [torch.ones(2, 1)] * 2, steps=1)


@both_paths
@every_verb
@pytest.mark.parametrize("element", [torch.ones(2, 1), (torch.ones(2, 1), None)], ids=["features", "pair-with-none"])
def test_sig_05_without_labels_in_the_input_labels_are_none(tmp_path, use_tpu, verb, element):
    seen = []
    run(make_trainer(tmp_path, watched(seen), use_tpu=use_tpu), verb, lambda params: [element] * 2)
    assert seen
    assert all(call.labels is None for call in seen)


# SIG-06

@every_verb
def test_sig_06_on_xla_params_carry_batch_size_use_tpu_and_context(tmp_path, verb):
    seen, input_params = [], []

    def watched_input(params):
        input_params.append(params)
        return input_fn(params)

    run(make_trainer(tmp_path, watched(seen), params={"width": 3}), verb, watched_input)
    for call in seen:
        assert call.params.keys() == {"width", "batch_size", "use_tpu", "context"}
        assert (call.params["width"], call.params["batch_size"], call.params["use_tpu"]) == (3, 2, True)
        assert isinstance(call.params["context"], TPUContext)
    assert [params.keys() for params in input_params] == [{"width", "batch_size", "context"}]
    assert input_params[0]["context"].current_input_fn_deployment()[1:] == (0, 1, 1)


@every_verb
def test_sig_06_without_xla_there_is_no_context_and_use_tpu_is_false(tmp_path, verb):
    seen, input_params = [], []

    def watched_input(params):
        input_params.append(params)
        return input_fn(params)

    run(make_trainer(tmp_path, watched(seen), params={"width": 3}, use_tpu=False), verb, watched_input)
    assert seen
    assert all(call.params == {"width": 3, "batch_size": 2, "use_tpu": False} for call in seen)
    assert input_params == [{"width": 3, "batch_size": 2}]


def test_sig_06_evaluation_off_the_accelerator_says_so_in_params(tmp_path):
    seen = []
    make_trainer(tmp_path, watched(seen), eval_on_tpu=False).evaluate(input_fn)
    assert seen
    assert all(call.params == {"batch_size": 2, "use_tpu": False} for call in seen)


@both_paths
@every_verb
def test_sig_06_what_the_users_functions_do_to_params_and_config_stays_with_them(tmp_path, use_tpu, verb):
    seen = []

    def spoils(features, labels, mode, params, config, model, optimizer):
        seen.append((copy.deepcopy(params["nested"]), config.seed))
        params["nested"].append("model_fn")
        params.clear()
        config.seed = 99
        return model_fn(features, labels, mode, params, model, optimizer)

    def input_spoils(params, config):
        dataset = input_fn(params)
        params["nested"].append("input_fn")
        params.clear()
        config.seed = 99
        return dataset

    trainer = make_trainer(tmp_path, spoils, use_tpu=use_tpu, params={"nested": [1]})
    run(trainer, verb, input_spoils)
    run(trainer, verb, input_spoils)
    assert trainer.params == {"nested": [1]}
    assert trainer.config.seed == 1
    assert len(seen) >= 4
    assert all(call == ([1], 1) for call in seen)


def test_sig_06_what_model_and_optimizer_functions_do_to_params_stays_with_them(tmp_path):
    def spoiling_model(params):
        params["nested"].append("model")
        return nn.Linear(1, 1)

    def spoiling_optimizer(model, params):
        params["nested"].append("optimizer")
        return torch.optim.SGD(model.parameters(), lr=0.1)

    trainer = make_trainer(tmp_path, model=spoiling_model, optimizer=spoiling_optimizer, params={"nested": [1]})
    trainer.train(input_fn, steps=1)
    assert trainer.params == {"nested": [1]}


def per_core_pipeline(input_fn, params):
    config = make_config(tpu_config=TPUConfig(per_host_input_for_training=False))
    return InputPipeline(InputSettings(
        input_fn=input_fn, mode=ModeKeys.TRAIN, params=params, config=config,
        plan=plan_input(ModeKeys.TRAIN, config.tpu_config, global_batch_size=4, num_hosts=1, num_replicas=2),
        topology=Topology(platform="CPU", devices=("CPU:0", "CPU:1"), num_replicas_per_host=2), static_shapes=True))


def test_sig_06_all_calls_of_input_fn_in_one_train_share_one_copy_with_its_own_context_each():
    mine, seen = [1], []

    def watched_input(params):
        seen.append((list(params["nested"]), params["context"].current_input_fn_deployment()[1]))
        params["nested"].append(2)
        return [torch.ones(2, 1)]

    per_core_pipeline(watched_input, {"nested": mine})
    assert mine == [1]
    assert seen == [([1], 0), ([1, 2], 1)]


def test_sig_06_an_input_fn_that_is_a_generator_reads_its_own_context_when_its_first_batch_is_drawn():
    def lazy_input(params):
        yield torch.full((2, 1), params["context"].current_input_fn_deployment()[1])

    batch = next(per_core_pipeline(lazy_input, {}))
    assert [replica.features[0].item() for replica in batch.replicas] == [0, 1]


# SIG-07

@both_paths
@every_verb
@pytest.mark.parametrize("returned", [None, {"loss": 1.0}, torch.zeros(())], ids=["None", "dict", "tensor"])
def test_sig_07_a_model_fn_that_returns_no_spec_is_a_value_error(tmp_path, use_tpu, verb, returned):
    trainer = make_trainer(tmp_path, lambda features, labels, mode, params: returned, use_tpu=use_tpu)
    kind = type(returned).__name__
    with pytest.raises(ValueError, match=rf"^model_fn should return an EstimatorSpec.*; got {kind}\."):
        run(trainer, verb)


def estimator_spec_fn(features, labels, mode, params, model, optimizer):
    spec = make_spec(mode, model(features), labels, optimizer)
    metrics = {"mean_label": (MeanMetric(), (labels,))} if mode == ModeKeys.EVAL else None
    return EstimatorSpec(mode, predictions=spec.predictions, loss=spec.loss, train_op=spec.train_op,
                         eval_metric_ops=metrics)


@both_paths
def test_sig_07_train_accepts_an_estimator_spec(tmp_path, use_tpu):
    trainer = make_trainer(tmp_path, estimator_spec_fn, use_tpu=use_tpu)
    assert trainer.train(input_fn, steps=2).global_step() == 2


@pytest.mark.parametrize(("verb", "noun"), [("evaluate", "evaluation"), ("predict", "prediction")])
def test_sig_07_on_xla_evaluate_and_predict_need_a_tpu_estimator_spec(tmp_path, verb, noun):
    match = rf"estimator_spec used by TPU {noun} must have type`TPUEstimatorSpec`\. Got EstimatorSpec"
    with pytest.raises(RuntimeError, match=match):
        run(make_trainer(tmp_path, estimator_spec_fn), verb)


def test_sig_07_without_xla_evaluate_and_predict_accept_an_estimator_spec(tmp_path):
    trainer = make_trainer(tmp_path, estimator_spec_fn, use_tpu=False)
    assert trainer.evaluate(input_fn)["mean_label"] == 0
    assert len(list(trainer.predict(input_fn))) == 4


def test_sig_07_evaluation_off_the_accelerator_accepts_an_estimator_spec(tmp_path):
    assert make_trainer(tmp_path, estimator_spec_fn, eval_on_tpu=False).evaluate(input_fn)["mean_label"] == 0


# SIG-08

@both_paths
@every_verb
def test_sig_08_model_fn_is_rehearsed_once_before_the_first_step(tmp_path, use_tpu, verb):
    seen, calls_at_begin = [], []

    class CountCalls(SessionRunHook):
        def begin(self, context):
            calls_at_begin.append(len(seen))

    run(make_trainer(tmp_path, watched(seen), use_tpu=use_tpu), verb, hooks=[CountCalls()])
    assert calls_at_begin == [1]


@both_paths
def test_sig_08_the_rehearsal_leaves_no_trace_in_buffers(tmp_path, use_tpu):
    rows = [torch.tensor([[float(i)], [i + 3.0]]) for i in range(3)]
    reference = nn.BatchNorm1d(1)
    for features in rows:
        reference(features)

    trainer = make_trainer(tmp_path, use_tpu=use_tpu, model=lambda params: nn.BatchNorm1d(1))
    trainer.train(lambda params: [(features, torch.zeros(2, 1)) for features in rows], steps=3)
    # Not running_var, for which XLA takes the biased variance.
    for name in ("running_mean", "num_batches_tracked"):
        np.testing.assert_allclose(trainer.get_variable_value(name), getattr(reference, name), rtol=1e-6)


@both_paths
def test_sig_08_the_rehearsal_runs_no_update(tmp_path, use_tpu):
    trainer = make_trainer(tmp_path, use_tpu=use_tpu, model=lambda params: nn.Linear(1, 1, bias=False))
    weights = []

    class ReadWeight(SessionRunHook):
        def begin(self, context):
            weights.append(context.model.weight.item())

        def after_run(self, context):
            weights.append(context.model.weight.item())

    trainer.train(input_fn, steps=1, hooks=[ReadWeight()])
    assert weights[1] == pytest.approx(weights[0] * 0.8)


@both_paths
def test_sig_08_a_train_op_that_is_a_callable_is_not_run_by_the_rehearsal(tmp_path, use_tpu):
    runs = []

    def counts_runs(features, labels, mode, params, model, optimizer):
        spec = make_spec(mode, model(features), labels, optimizer)
        return spec.replace(train_op=lambda: runs.append(spec.train_op.run(0)))

    make_trainer(tmp_path, counts_runs, use_tpu=use_tpu).train(input_fn, steps=3)
    assert 1 <= len(runs) <= 3


@both_paths
@every_verb
def test_sig_08_the_rehearsal_leaves_no_trace_in_random_state(tmp_path, use_tpu, verb):
    def drawn(extra):
        """Returns what the steps draw, where model_fn draws `extra` more numbers when it is called first."""
        calls, draws = [], []

        def draws_fn(features, labels, mode, params, model, optimizer):
            calls.append(mode)
            for _ in range(extra if len(calls) == 1 else 0):
                torch.rand(2, 1), torch.rand(2, 1, device=features.device)
            host, device = torch.rand(2, 1), torch.rand(2, 1, device=features.device)
            return make_spec(mode, model(features), labels, optimizer, host_call=(
                lambda host, device: draws.append(torch.stack([host, device])), [host.to(device.device), device]))

        run(make_trainer(tmp_path / str(extra), draws_fn, use_tpu=use_tpu), verb)
        return torch.stack(draws)

    first, second = drawn(0), drawn(3)
    assert len(first) == ROWS_OF[verb] // 2
    assert torch.equal(first, second)


# SIG-09

class RowsOneByOne(IterableDataset):
    """Four rows."""

    def __iter__(self):
        return iter(zip(torch.ones(4, 1), torch.zeros(4, 1), strict=True))


INPUT_FORMS = {
    "Dataset": input_fn,
    "IterableDataset": lambda params: RowsOneByOne(),
    "DataLoader": lambda params: DataLoader(input_fn(params), batch_size=params["batch_size"]),
    "DataLoader with workers": lambda params: DataLoader(
        input_fn(params), batch_size=params["batch_size"], num_workers=2),
    "list": lambda params: [ones_and_zeros()] * 2,
    "generator": lambda params: (ones_and_zeros() for _ in range(2)),
    "numpy": lambda params: [(np.ones((2, 1), np.float32), np.zeros((2, 1), np.float32))] * 2,
}
DEPLOYMENTS = [InputPipelineConfig.PER_SHARD_V1, InputPipelineConfig.PER_HOST_V1, InputPipelineConfig.PER_HOST_V2,
               InputPipelineConfig.BROADCAST]


@pytest.mark.parametrize("form", INPUT_FORMS)
@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment.name)
def test_sig_09_every_deployment_accepts_every_input_form(tmp_path, deployment, form):
    trainer = make_trainer(
        tmp_path, config=make_config(tpu_config=TPUConfig(per_host_input_for_training=deployment)))
    assert trainer.train(INPUT_FORMS[form], steps=2).global_step() == 2
    assert trainer.evaluate(INPUT_FORMS[form])["loss"] > 0
    assert len(list(trainer.predict(INPUT_FORMS[form]))) == 4


@pytest.mark.parametrize("form", INPUT_FORMS)
def test_sig_09_without_xla_every_input_form_is_accepted(tmp_path, form):
    trainer = make_trainer(tmp_path, use_tpu=False)
    assert trainer.train(INPUT_FORMS[form], steps=2).global_step() == 2
    assert trainer.evaluate(INPUT_FORMS[form])["loss"] > 0
    assert len(list(trainer.predict(INPUT_FORMS[form]))) == 4


Pair = collections.namedtuple("Pair", ["left", "right"])


@both_paths
@every_verb
@pytest.mark.parametrize(("batch", "kind"), [
    (ones_and_zeros(), "tuple"), (torch.ones(2, 1), "Tensor"), ({"x": torch.ones(2, 1)}, "dict"),
    (Pair(*ones_and_zeros()), "Pair"), (np.ones((2, 1), np.float32), "ndarray")], ids=lambda value: str(type(value)))
def test_sig_09_one_batch_in_place_of_an_iterable_of_them_is_a_value_error(tmp_path, use_tpu, verb, batch, kind):
    match = rf"should return a Dataset, a DataLoader or an iterable of batches; got one batch \({kind}\)"
    with pytest.raises(ValueError, match=match):
        run(make_trainer(tmp_path, use_tpu=use_tpu), verb, lambda params: batch)


@both_paths
@pytest.mark.parametrize("returned", [None, 3, 1.5])
def test_sig_09_what_cannot_be_iterated_is_a_type_error(tmp_path, use_tpu, returned):
    match = rf"should return a Dataset, a DataLoader or an iterable of batches; got {type(returned).__name__}"
    with pytest.raises(TypeError, match=match):
        make_trainer(tmp_path, use_tpu=use_tpu).train(lambda params: returned, steps=1)


# SIG-10

@both_paths
@every_verb
@pytest.mark.parametrize("length", [0, 1, 3])
def test_sig_10_a_tuple_of_other_than_two_is_a_value_error_on_both_paths(tmp_path, use_tpu, verb, length):
    batch = (torch.ones(2, 1),) * length
    match = rf"input_fn should return \(features, labels\) as a len 2 tuple; got a tuple of {length}"
    with pytest.raises(ValueError, match=match):
        run(make_trainer(tmp_path, use_tpu=use_tpu), verb, lambda params: [batch] * 2)


@both_paths
def test_sig_10_a_list_of_two_is_features_and_labels(tmp_path, use_tpu):
    seen = []
    make_trainer(tmp_path, watched(seen), use_tpu=use_tpu).evaluate(
        lambda params: [[torch.ones(2, 1), torch.zeros(2, 3)]])
    assert {(call.features.shape, call.labels.shape) for call in seen} == {((2, 1), (2, 3))}


@both_paths
@pytest.mark.parametrize("length", [1, 3])
def test_sig_10_a_list_of_other_than_two_is_features(tmp_path, use_tpu, length):
    seen = []
    make_trainer(tmp_path, watched(seen), use_tpu=use_tpu).evaluate(lambda params: [[torch.ones(2, 1)] * length])
    assert seen
    assert all(type(call.features) is list and len(call.features) == length and call.labels is None for call in seen)


# SIG-11

NESTED_FEATURES = {
    "dict of tuples": {"a": (torch.ones(2, 1), torch.ones(2, 3)), "b": (torch.ones(2, 4),)},
    "tuple": (torch.ones(2, 1), torch.ones(2, 3)),
    "namedtuple": Pair(torch.ones(2, 1), torch.ones(2, 3)),
    "deep": {"a": [Pair(torch.ones(2, 1), {"b": torch.ones(2, 2, 2)}), torch.ones(2, 5)]},
}


@both_paths
@every_verb
@pytest.mark.parametrize("nesting", NESTED_FEATURES)
def test_sig_11_model_fn_gets_the_nesting_and_types_that_the_input_yields(tmp_path, use_tpu, verb, nesting):
    features, seen = NESTED_FEATURES[nesting], []
    run(make_trainer(tmp_path, watched(seen), use_tpu=use_tpu), verb,
        lambda params: [(features, torch.zeros(2, 1))] * 2)
    leaves, structure = torch.utils._pytree.tree_flatten(features)
    assert seen
    for call in seen:
        got, got_structure = torch.utils._pytree.tree_flatten(call.features)
        assert got_structure == structure
        assert type(call.features) is type(features)
        assert [leaf.shape for leaf in got] == [leaf.shape for leaf in leaves]


@dataclasses.dataclass
class Registered:
    image: torch.Tensor
    mask: torch.Tensor


torch.export.register_dataclass(Registered)


@both_paths
@every_verb
def test_sig_11_a_dataclass_that_torch_knows_keeps_its_type_too(tmp_path, use_tpu, verb):
    seen = []
    run(make_trainer(tmp_path, watched(seen), use_tpu=use_tpu), verb,
        lambda params: [(Registered(torch.ones(2, 1), torch.ones(2, 3)), torch.zeros(2, 1))] * 2)
    assert {(type(call.features), call.features.mask.shape) for call in seen} == {(Registered, (2, 3))}


def test_sig_11_a_dataclass_that_torch_does_not_know_is_told_how_to_register_it(tmp_path):
    @dataclasses.dataclass
    class Unknown:
        image: torch.Tensor

    with pytest.raises(TypeError, match=r"got Unknown\. Register the dataclass: torch.export.register_dataclass\("):
        make_trainer(tmp_path).evaluate(lambda params: [Unknown(torch.ones(2, 1))])


def test_sig_11_a_namedtuple_by_itself_is_features(tmp_path):
    seen = []
    make_trainer(tmp_path, watched(seen)).evaluate(lambda params: [Pair(torch.ones(2, 1), torch.ones(2, 3))])
    assert seen
    assert all(type(call.features) is Pair and call.labels is None for call in seen)


@both_paths
def test_sig_11_labels_may_be_nested_too(tmp_path, use_tpu):
    seen = []
    make_trainer(tmp_path, watched(seen), use_tpu=use_tpu).evaluate(
        lambda params: [(torch.ones(2, 1), {"a": Pair(torch.zeros(2), torch.zeros(2, 3))})])
    assert seen
    assert all(type(call.labels["a"]) is Pair and call.labels["a"].right.shape == (2, 3) for call in seen)


# SIG-12

@both_paths
def test_sig_12_many_small_features_arrive_under_their_names_in_their_shapes_and_dtypes(tmp_path, use_tpu):
    features = {"x": torch.ones(2, 1)}
    for i in range(20):
        dtype = torch.float32 if i % 2 else torch.int32
        features[f"key_{19 - i}"] = torch.tensor([[i], [-i]], dtype=dtype)
    features |= {"wide": torch.arange(6).reshape(2, 3), "flag": torch.tensor([True, False])}
    seen, on_host = [], []

    def notes_fn(features, labels, mode, params, model, optimizer):
        seen.append({name: (tensor.shape, tensor.dtype) for name, tensor in features.items()})
        return make_spec(mode, model(features["x"]), labels, optimizer,
                         host_call=(lambda **tensors: on_host.append(tensors), dict(features)))

    make_trainer(tmp_path, notes_fn, use_tpu=use_tpu).evaluate(lambda params: [(features, torch.zeros(2, 1))])
    assert seen
    for names in seen:
        assert list(names.items()) == [(name, (tensor.shape, tensor.dtype)) for name, tensor in features.items()]
    assert len(on_host) == 1
    for name, tensor in features.items():
        assert on_host[0][name].dtype is tensor.dtype
        assert torch.equal(on_host[0][name], tensor), name


# SIG-13

def with_leaf(kind, is_dict, leaf):
    """A batch whose features or labels hold `leaf`."""
    other = torch.ones(2, 1)
    tree = {"a": other, "b": leaf} if is_dict else leaf
    return (tree, other) if kind == "features" else (other, tree)


@pytest.mark.parametrize("is_dict", [False, True], ids=["tensor", "dict"])
@pytest.mark.parametrize(("verb", "kind"), [
    ("train", "features"), ("train", "labels"), ("evaluate", "features"), ("evaluate", "labels"),
    ("predict", "features")])
def test_sig_13_on_xla_a_shape_other_than_the_first_batchs_is_a_value_error_before_model_fn_runs(
        tmp_path, verb, kind, is_dict):
    seen = []
    trainer = make_trainer(tmp_path, watched(seen))
    batches = [with_leaf(kind, is_dict, torch.ones(2, columns)) for columns in (1, 1, 3)]
    name = rf"{kind}\['b'\]" if is_dict else kind
    match = rf"static shape; {name} changed from \[batch, 1\] to \[batch, 3\]"
    with pytest.raises(ValueError, match=match):
        if verb == "train":
            trainer.train(lambda params: batches, steps=3)
        else:
            run(trainer, verb, lambda params: batches)
    assert seen
    shapes = {leaf.shape for call in seen for tree in (call.features, call.labels)
              for leaf in torch.utils._pytree.tree_leaves(tree) if leaf is not None}
    assert shapes == {(2, 1)}


@every_verb
def test_sig_13_without_xla_shapes_may_change(tmp_path, verb):
    seen = []

    def flattens(features, labels, mode, params, model, optimizer):
        seen.append(tuple(features.shape))
        return make_spec(mode, model(features.mean(1, keepdim=True)), None, optimizer)

    batches = [(torch.ones(rows, columns), torch.zeros(rows)) for rows, columns in ((2, 1), (3, 1), (1, 4))]
    trainer = make_trainer(tmp_path, flattens, use_tpu=False)
    if verb == "train":
        trainer.train(lambda params: batches, steps=3)
    else:
        run(trainer, verb, lambda params: batches)
    assert [shape for shape, _ in itertools.groupby(seen)] == [(2, 1), (3, 1), (1, 4)]


# SIG-14

@both_paths
@pytest.mark.parametrize("form", INPUT_FORMS)
def test_sig_14_predict_passes_no_labels_on_any_path(tmp_path, use_tpu, form):
    seen = []
    list(make_trainer(tmp_path, watched(seen), use_tpu=use_tpu).predict(INPUT_FORMS[form]))
    assert seen
    assert all(call.labels is None and call.mode is ModeKeys.PREDICT for call in seen)


@both_paths
def test_sig_14_a_model_fn_without_labels_predicts_from_input_that_has_them(tmp_path, use_tpu):
    assert len(list(make_trainer(tmp_path, no_labels_fn, use_tpu=use_tpu).predict(input_fn))) == 4


@both_paths
def test_sig_14_labels_reach_train_and_eval(tmp_path, use_tpu):
    seen = []
    trainer = make_trainer(tmp_path, watched(seen), use_tpu=use_tpu)
    trainer.train(input_fn, steps=1).evaluate(input_fn)
    assert {call.mode for call in seen} == {ModeKeys.TRAIN, ModeKeys.EVAL}
    assert all(call.labels.shape == (2, 1) for call in seen)
