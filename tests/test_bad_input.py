"""Bad input is refused with a message that says the rule, what was got and how to mend it, before anything is compiled.

On XLA the refused call must not compile or run a single graph, and no call may leave a thread behind.
"""

from __future__ import annotations

import contextlib
import re
import threading
import traceback
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch_xla.debug.metrics as xla_metrics
from torch.utils.data import IterableDataset, TensorDataset
from torchmetrics import MeanMetric

import tpuspec.train
from tests.models import VERBS, input_fn, make_config, make_spec, make_trainer, model_fn, run
from tpuspec import TPUConfig, Trainer
from tpuspec.engine import devices, executable
from tpuspec.errors import TpuspecError

both_paths = pytest.mark.parametrize("use_tpu", [True, False], ids=["xla", "native"])
every_verb = pytest.mark.parametrize("verb", VERBS)


runs_of_engine: list[int] = []


@pytest.fixture(autouse=True)
def counted_runs(monkeypatch):
    """Counts what engines run."""
    compile_step = devices.compile_step

    def counted(*args):
        run = compile_step(*args)
        return lambda inputs: (runs_of_engine.append(0), run(inputs))[1]

    monkeypatch.setattr(devices, "compile_step", counted)


def num_graphs_run() -> int:
    """Programs that this process has run."""
    return len(runs_of_engine)


def num_compiles() -> int:
    data = xla_metrics.metric_data("CompileTime")
    return (data[0] if data else 0) + executable.num_compiles()


def living_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread)}


@contextlib.contextmanager
def refused(kind: type[Exception], *parts: str, graphs: int = 0) -> Iterator[None]:
    """Expects one of tpuspec's errors whose message has all of `parts`, after `graphs` runs of compiled graphs."""
    graphs_before, compiles_before, threads_before = num_graphs_run(), num_compiles(), living_threads()
    with pytest.raises(kind, match=parts[0]) as caught:
        yield
    assert isinstance(caught.value, TpuspecError)
    for part in parts[1:]:
        assert re.search(part, str(caught.value)), f"{part!r} is not in: {caught.value}"
    assert num_compiles() == compiles_before
    assert num_graphs_run() - graphs_before == graphs
    assert living_threads() <= threads_before
    # Tensors that the error keeps alive would run with whatever the process runs next.
    traceback.clear_frames(caught.value.__traceback__)


def test_the_counters_see_a_graph_that_is_compiled_and_one_that_is_run_again(tmp_path):
    def odd_model_fn(features, labels, mode, params, model, optimizer):
        return make_spec(mode, model(features).sin().cos().tan(), labels, optimizer)

    graphs, compiles = num_graphs_run(), num_compiles()
    make_trainer(tmp_path, odd_model_fn).evaluate(input_fn)
    assert num_compiles() - compiles == 1
    assert num_graphs_run() - graphs == 2


# The arguments of the user's functions

def test_model_fn_that_is_no_function():
    with refused(TypeError, "^model_fn must be a function", "got NoneType"):
        Trainer(None, config=make_config(model_dir="unused"), train_batch_size=2)


@every_verb
@pytest.mark.parametrize("value", [None, [torch.ones(2, 1)]], ids=["None", "list"])
def test_input_fn_that_is_no_function(tmp_path, verb, value):
    with refused(TypeError, "^input_fn must be a function that returns the input", f"got {type(value).__name__}"):
        run(make_trainer(tmp_path), verb, value)


def test_model_fn_without_features():
    with refused(ValueError, r"^model_fn \(.*<lambda>\) must include features argument"):
        Trainer(lambda labels, params: None, config=make_config(model_dir="unused"), train_batch_size=2)


def test_model_fn_without_params_where_params_are_given():
    with refused(ValueError, r"^model_fn \(.*<lambda>\) does not include params argument", "params are passed"):
        Trainer(lambda features, labels: None, config=make_config(model_dir="unused"), train_batch_size=2, params={})


@both_paths
@every_verb
def test_model_fn_without_params(tmp_path, verb, use_tpu):
    trainer = make_trainer(tmp_path, lambda features, labels: None, params=None, use_tpu=use_tpu)
    with refused(ValueError, r"^model_fn \(.*<lambda>\) does not include params argument", "required", "batch_size"):
        run(trainer, verb)


@both_paths
@every_verb
def test_input_fn_without_params(tmp_path, verb, use_tpu):
    with refused(ValueError, r"^input_fn \(.*<lambda>\) does not include params argument", "required",
                 r'params\["batch_size"\]'):
        run(make_trainer(tmp_path, use_tpu=use_tpu), verb, lambda mode: input_fn({}))


def test_unknown_argument_of_model_fn():
    with refused(ValueError, r"not expected args: \['lables'\]", "It may take features, labels, mode",
                 r"Did you mean 'labels'\?"):
        Trainer(lambda features, lables, mode, params: None, config=make_config(model_dir="unused"),
                train_batch_size=2)


@every_verb
def test_unknown_argument_of_input_fn(tmp_path, verb):
    with refused(ValueError, r"^input_fn \(.*<lambda>\) has following not expected args: \['batch'\]",
                 "It may take params, mode, config, input_context"):
        run(make_trainer(tmp_path), verb, lambda params, batch: input_fn(params))


@both_paths
@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_labels_that_model_fn_does_not_take(tmp_path, verb, use_tpu):
    trainer = make_trainer(tmp_path, lambda features, mode, params: None, use_tpu=use_tpu)
    with refused(ValueError, "does not take labels, but input_fn returns labels", "Add a labels argument"):
        run(trainer, verb)


# Settings of the Trainer, and arguments of its methods

@pytest.mark.parametrize("name", ["train_batch_size", "eval_batch_size", "predict_batch_size"])
@pytest.mark.parametrize(("value", "kind", "rule"), [
    (2.0, TypeError, "must be int; got 2.0"), ("2", TypeError, "must be int; got '2'"),
    (0, ValueError, "must be positive; got 0"), (-2, ValueError, "must be positive; got -2")])
def test_batch_size_of_the_wrong_type_or_sign(tmp_path, name, value, kind, rule):
    with refused(kind, f"^{name} {rule}"):
        make_trainer(tmp_path, **{name: value})


def test_batch_size_that_is_missing(tmp_path):
    with refused(ValueError, "^`train_batch_size` cannot be `None`", "pass the global batch size"):
        make_trainer(tmp_path, train_batch_size=None)
    trainer = make_trainer(tmp_path, eval_batch_size=None, predict_batch_size=None)
    with refused(ValueError, "^eval_batch_size .* cannot be `None`", "pass eval_batch_size to Trainer"):
        trainer.evaluate(input_fn)
    with refused(ValueError, "^predict_batch_size .* cannot be `None`", "pass predict_batch_size to Trainer"):
        next(trainer.predict(input_fn))


@both_paths
@pytest.mark.parametrize("key", ["batch_size", "context"])
def test_reserved_keys_in_params(tmp_path, key, use_tpu):
    with refused(ValueError, rf"^\['{key}'\] are reserved keys in params", "Pass batch sizes as train_batch_size"):
        make_trainer(tmp_path, params={key: 1, "width": 8}, use_tpu=use_tpu)


@both_paths
def test_params_that_are_no_mapping(tmp_path, use_tpu):
    with refused(TypeError, "^params must be a dict; got list"):
        make_trainer(tmp_path, params=[("width", 8)], use_tpu=use_tpu)


@both_paths
def test_both_steps_and_max_steps(tmp_path, use_tpu):
    with refused(ValueError, "^Can not provide both steps and max_steps"):
        make_trainer(tmp_path, use_tpu=use_tpu).train(input_fn, steps=5, max_steps=10)


@both_paths
@pytest.mark.parametrize("name", ["steps", "max_steps"])
@pytest.mark.parametrize(("value", "kind", "message"), [
    (12.3, TypeError, "Train {} must be int; got 12.3"), ("12", TypeError, "{} must be int; got '12'"),
    (0, ValueError, "Must specify {} > 0, given: 0"), (-3, ValueError, "Must specify {} > 0, given: -3")])
def test_train_steps_of_the_wrong_type_or_sign(tmp_path, name, value, kind, message, use_tpu):
    with refused(kind, "^" + message.format(name)):
        make_trainer(tmp_path, use_tpu=use_tpu).train(input_fn, **{name: value})


@both_paths
@pytest.mark.parametrize(("value", "kind", "message"), [
    (12.3, TypeError, "^Eval steps must be int; got 12.3"), (0, ValueError, "teps .*0"), (-3, ValueError, "teps .*-3")])
def test_eval_steps_of_the_wrong_type_or_sign(tmp_path, value, kind, message, use_tpu):
    with refused(kind, message):
        make_trainer(tmp_path, use_tpu=use_tpu).evaluate(input_fn, steps=value)


def test_num_shards_that_is_not_the_number_of_replicas(tmp_path):
    trainer = make_trainer(tmp_path, config=make_config(tpu_config=TPUConfig(num_shards=16)))
    with refused(ValueError, "num_shards is not set correctly", r"should be \(1\), got \(16\)", "Leave it None"):
        trainer.evaluate(input_fn)


# What input_fn returns and yields

class NoRows(IterableDataset):
    """An empty stream."""

    def __iter__(self):
        return iter(())


@both_paths
@every_verb
@pytest.mark.parametrize("empty", [
    lambda params: [], lambda params: iter(()), lambda params: NoRows(),
    lambda params: TensorDataset(torch.ones(0, 1), torch.zeros(0, 1))],
    ids=["list", "iterator", "IterableDataset", "Dataset"])
def test_empty_dataset(tmp_path, verb, empty, use_tpu):
    with refused(ValueError, "^input_fn yielded no batches", "dataset is empty"):
        run(make_trainer(tmp_path, use_tpu=use_tpu), verb, empty)


def test_training_dataset_of_less_than_one_batch(tmp_path):
    with refused(ValueError, "has 1 rows, less than one batch of 2", "Lower train_batch_size"):
        run(make_trainer(tmp_path), "train", lambda params: TensorDataset(torch.ones(1, 1), torch.zeros(1, 1)))


def batch(features=None, labels=None):
    return {"a": torch.ones(2, 1), "b": torch.ones(2, 3)} if features is None else features, (
        torch.zeros(2, 1) if labels is None else labels)


def on_two_keys(features, labels, mode, params, model, optimizer):
    return make_spec(mode, model(features["a"]), labels, optimizer)


CHANGED_BATCHES = {
    "missing key": (batch({"a": torch.ones(2, 1)}), [r"missing: \[\"features\['b'\]\"\], new: \[\]"]),
    "new key": (batch({"a": torch.ones(2, 1), "b": torch.ones(2, 3), "c": torch.ones(2)}),
                [r"missing: \[\], new: \[\"features\['c'\]\"\]"]),
    "other nesting": (batch((torch.ones(2, 1), torch.ones(2, 3))), ["missing", "features.0."]),
    "no labels": ({"a": torch.ones(2, 1), "b": torch.ones(2, 3)}, [r"missing: \['labels'\]"]),
    "shape": (batch({"a": torch.ones(2, 1), "b": torch.ones(2, 4)}),
              [r"features\['b'\] changed from \[batch, 3\] to \[batch, 4\]", "Pad to one shape"]),
    "rank": (batch(labels=torch.zeros(2)), [r"labels changed from \[batch, 1\] to \[batch", "Pad to one shape"]),
    "dtype": (batch({"a": torch.ones(2, 1), "b": torch.ones(2, 3, dtype=torch.int64)}),
              [r"features\['b'\] changed from torch.float32 to torch.int64"]),
    "array dtype": (batch(labels=np.zeros((2, 1))), ["labels changed from torch.float32 to torch.float64"]),
}


@pytest.mark.parametrize(("verb", "change"), [
    pytest.param(verb, change, id=f"{verb}-{change}") for verb in VERBS for change in CHANGED_BATCHES
    if verb != "predict" or change not in ("no labels", "rank", "array dtype")])
def test_batch_that_differs_from_the_first_one_is_refused_without_compiling_a_step_for_it(tmp_path, verb, change):
    later, parts = CHANGED_BATCHES[change]
    trainer = make_trainer(tmp_path, on_two_keys)
    run(trainer, verb, lambda params: [batch()] * 2)
    rule = "^every batch must have the structure, shapes and dtypes of the first one"
    with refused(ValueError, rule, *parts, graphs=1 if verb == "train" else 2):
        if verb == "train":
            trainer.train(lambda params: [batch(), batch(), later], steps=3)
        else:
            run(trainer, verb, lambda params: [batch(), batch(), later])


@pytest.mark.parametrize("verb", ["evaluate", "predict"])
def test_short_batch_that_is_not_the_last(tmp_path, verb):
    trainer = make_trainer(tmp_path)
    run(trainer, verb)
    short, full = (torch.ones(1, 1), torch.zeros(1, 1)), (torch.ones(2, 1), torch.zeros(2, 1))
    with refused(ValueError, "only the last batch may be short of batch_size, 2", "2 rows followed one of 1", graphs=1):
        run(trainer, verb, lambda params: [short, full])


@every_verb
def test_batch_of_more_rows_than_batch_size(tmp_path, verb):
    with refused(ValueError, "batch size should not be greater than batch_size, 2", "got 3 rows",
                 r"Batch by params\['batch_size'\]"):
        run(make_trainer(tmp_path), verb, lambda params: [(torch.ones(3, 1), torch.zeros(3, 1))])


def test_training_batch_of_fewer_rows_than_batch_size(tmp_path):
    with refused(ValueError, r"every training batch must have params\['batch_size'\]=2 rows", "got 1",
                 "drop_last=True"):
        run(make_trainer(tmp_path), "train", lambda params: [(torch.ones(1, 1), torch.zeros(1, 1))])


@every_verb
def test_batch_without_rows(tmp_path, verb):
    with refused(ValueError, "^input_fn yielded a batch without rows"):
        run(make_trainer(tmp_path), verb, lambda params: [(torch.ones(0, 1), torch.zeros(0, 1))])


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_leaves_of_different_numbers_of_rows(tmp_path, verb):
    with refused(ValueError, "^labels must be batch-major with the rows of features, 2", r"got shape \[3, 1\]"):
        run(make_trainer(tmp_path), verb, lambda params: [(torch.ones(2, 1), torch.zeros(3, 1))])


@every_verb
def test_scalar_leaf(tmp_path, verb):
    with refused(ValueError, r"^features\['b'\] must be batch-major, \[batch, ...\]", "got a scalar"):
        run(make_trainer(tmp_path, on_two_keys), verb,
            lambda params: [({"a": torch.ones(2, 1), "b": torch.tensor(1.0)}, torch.zeros(2, 1))])


@both_paths
@every_verb
@pytest.mark.parametrize(("leaf", "got"), [
    (np.array(["one", 2], dtype=object), "got dtype object"), (np.array(["a", "b"]), "got a column of strings"),
    (np.array([b"a", b"b"]), "got a column of strings"),
    (np.array(["2020-01-01"] * 2, "datetime64[D]"), "got dtype datetime64")],
    ids=["object", "str", "bytes", "datetime"])
def test_array_of_objects_or_strings(tmp_path, verb, leaf, got, use_tpu):
    def model_fn(features, labels, mode, params, model, optimizer):
        return make_spec(mode, features["b"] + model(features["a"]), labels, optimizer)

    with refused(TypeError, r"^features\['b'\] must be an array of numbers or booleans", got,
                 "Encode strings and objects"):
        run(make_trainer(tmp_path, model_fn, use_tpu=use_tpu), verb,
            lambda params: [({"a": torch.ones(2, 1), "b": leaf}, torch.zeros(2, 1))])


@both_paths
@every_verb
@pytest.mark.parametrize("leaf", ["text", 1, 1.5, b"bytes"], ids=repr)
def test_leaf_that_is_no_tensor_or_array(tmp_path, verb, leaf, use_tpu):
    with refused(TypeError, r"^features\['b'\] must be a tensor or an array", f"got {type(leaf).__name__}"):
        run(make_trainer(tmp_path, on_two_keys, use_tpu=use_tpu), verb,
            lambda params: [({"a": torch.ones(2, 1), "b": leaf}, torch.zeros(2, 1))])


# What model_fn returns

@both_paths
@pytest.mark.parametrize("name", ["loss", "global_step"])
@pytest.mark.parametrize("value", [1.0, (MeanMetric(), (torch.ones(2),))], ids=["number", "Metric"])
def test_metric_with_a_reserved_name(tmp_path, name, value, use_tpu):
    def bad_metric_fn(features, labels, mode, params, model, optimizer):
        return make_spec(mode, model(features), labels, optimizer, eval_metrics=(lambda x: {name: value}, [features]))

    with refused(ValueError, f"^Metric with name `{name}` is not allowed", "Rename it"):
        make_trainer(tmp_path, bad_metric_fn, use_tpu=use_tpu).evaluate(input_fn)


@every_verb
@pytest.mark.parametrize(("tensors", "name"), [(list, "0"), (lambda tensors: {"level": tensors[0]}, "level")],
                         ids=["list", "dict"])
def test_scalar_tensor_of_host_call(tmp_path, verb, tensors, name):
    def scalar_host_call(features, labels, mode, params, model, optimizer):
        return make_spec(mode, model(features), labels, optimizer,
                         host_call=(lambda level: None, tensors([features.sum()])))

    with refused(RuntimeError, "^All tensors of host_call should preserve batch size dimension",
                 f"got scalar '{name}'", r"Reshape it to \[1\]"):
        run(make_trainer(tmp_path, scalar_host_call), verb)


def test_scalar_tensor_of_eval_metrics(tmp_path):
    def scalar_metric(features, labels, mode, params, model, optimizer):
        return make_spec(mode, model(features), labels, optimizer,
                         eval_metrics=(lambda level: {"level": level}, {"level": features.sum()}))

    with refused(RuntimeError, "^All tensors of eval_metrics should preserve batch size dimension",
                 "got scalar 'level'", r"Reshape it"):
        make_trainer(tmp_path, scalar_metric).evaluate(input_fn)


# The command line and model_dir

@pytest.mark.parametrize(("override", "near"), [
    ("run.max_stepz=5", "run.max_steps"), ("train_batchsize=8", "train_batch_size"),
    ("params.learning_rat=0.1", "params.learning_rate")])
def test_unknown_setting_on_the_command_line(tmp_path, monkeypatch, capsys, override, near):
    monkeypatch.chdir(tmp_path)
    graphs = num_graphs_run()
    code = tpuspec.train.main(["config=digits", override, f"model_dir={tmp_path / 'run'}"])
    key = override.partition("=")[0]
    assert re.search(rf"there is no setting '{key}'.*; did you mean '{near}'\?", capsys.readouterr().err)
    assert code == 2
    assert num_graphs_run() == graphs
    assert list(tmp_path.iterdir()) == []


def below_a_file(tmp_path):
    (tmp_path / "file").write_text("in the way")
    return tmp_path / "file" / "run"


def a_file(tmp_path):
    (tmp_path / "file").write_text("in the way")
    return tmp_path / "file"


def in_proc(tmp_path):
    return "/proc/tpuspec-run"


unwritable = pytest.mark.parametrize("make_path", [below_a_file, a_file, in_proc])


def never_called(params):
    raise AssertionError("input_fn was called, though its results cannot be kept")


@both_paths
@unwritable
def test_unwritable_model_dir_ends_train_before_input_fn_is_called(tmp_path, make_path, use_tpu):
    path = make_path(tmp_path)
    trainer = make_trainer(path, use_tpu=use_tpu)
    with refused(ValueError, "^model_dir must be a folder that can be written", re.escape(repr(str(path))),
                 "set another model_dir"):
        trainer.train(never_called, steps=1)


@both_paths
@unwritable
def test_unwritable_model_dir_ends_evaluate_but_not_predict_which_writes_nothing(tmp_path, make_path, use_tpu):
    path = make_path(tmp_path)
    trainer = make_trainer(path, use_tpu=use_tpu)
    with refused(ValueError, "^model_dir must be a folder that can be written", re.escape(repr(str(path)))):
        trainer.evaluate(never_called)
    assert len(list(trainer.predict(input_fn))) == 4


def test_a_trainer_works_after_it_refused_bad_input(tmp_path):
    trainer = make_trainer(tmp_path, model_fn)
    with refused(ValueError, "yielded no batches"):
        trainer.train(lambda params: [], steps=1)
    with refused(ValueError, "got one batch"):
        trainer.evaluate(lambda params: torch.ones(2, 1))
    assert trainer.train(input_fn, steps=2).evaluate(input_fn)["global_step"] == 2
    assert len(list(trainer.predict(input_fn))) == 4
