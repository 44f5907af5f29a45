"""Faults 28, 29 and 39 to 46: what goes wrong in the input ends in the right error, or in the documented end."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tests.faults.aftermath import fault, nothing_left, verified_steps
from tests.models import VERBS, make_config, make_spec, make_trainer, run
from tests.several_replicas import use_fake
from tpuspec import InputPipelineConfig, ModeKeys, TPUConfig
from tpuspec.errors import ConfigError, InputError, InputTypeError, SpecUsageError

ROOT = Path(__file__).resolve().parents[2]

both_paths = pytest.mark.parametrize("use_tpu", [True, False], ids=["xla", "native"])
every_verb = pytest.mark.parametrize("verb", VERBS)

NUM_ROWS, BAD_ROW = 24, 14  # batches of 2: the eighth is bad


def on_x(features, labels, mode, params, model, optimizer):
    return make_spec(mode, model(features["x"]), labels, optimizer)


class Rows(Dataset):
    """Rows of {'x': [1]} with labels [1]; a worker that comes to BAD_ROW does `happens` instead."""

    def __init__(self, happens) -> None:
        self.happens = happens

    def __len__(self):
        return NUM_ROWS

    def __getitem__(self, index):
        x = torch.tensor([float(index)])
        if index >= BAD_ROW:
            x = self.happens(x)
        return {"x": x}, torch.zeros(1)


def loaded(happens, **options):
    """An input_fn whose DataLoader has two workers."""
    return lambda params: DataLoader(Rows(happens), batch_size=params["batch_size"], **{"num_workers": 2, **options})


def start(folder, use_tpu=True, **arguments):
    return make_trainer(folder, on_x, use_tpu=use_tpu, config=make_config(
        save_checkpoints_steps=2, tpu_config=TPUConfig(iterations_per_loop=2)), **arguments)


def run_far(trainer, verb, input_fn, got=None):
    """Trains 12 steps, evaluates, or predicts; collects what predict yields in `got`."""
    if verb == "train":
        return trainer.train(input_fn, steps=NUM_ROWS // 2)
    if verb == "evaluate":
        return trainer.evaluate(input_fn)
    for row in trainer.predict(input_fn):
        (got if got is not None else []).append(row)


def divides_by_zero(x):
    raise ZeroDivisionError("bad row of the user")


@both_paths
@every_verb
@pytest.mark.parametrize("prefetch", [0, 2])
def test_fault_28_an_error_of_input_fn_on_a_later_batch_is_that_very_error_and_no_clean_end(
        tmp_path, use_tpu, verb, prefetch):
    error = OSError("disk gone")

    def input_fn(params):
        for i in range(7):
            yield {"x": torch.full((2, 1), float(i))}, torch.zeros(2, 1)
        raise error

    trainer = make_trainer(tmp_path, on_x, use_tpu=use_tpu, config=make_config(
        save_checkpoints_steps=2, prefetch_batches=prefetch, tpu_config=TPUConfig(iterations_per_loop=2)))
    rows = []
    with fault(OSError, "^disk gone$") as caught:
        run_far(trainer, verb, input_fn, rows)
    assert caught.value is error
    assert "raise error" in "".join(traceback.format_exception(caught.value))
    if verb == "train":
        assert verified_steps(tmp_path)[-1] == 6
    if verb == "predict":
        assert len(rows) == 14


@both_paths
@every_verb
def test_fault_29_an_error_in_a_loader_worker_is_that_error_and_names_the_worker(tmp_path, use_tpu, verb):
    with fault(ZeroDivisionError, r"Caught ZeroDivisionError in DataLoader worker process 1",
               "in divides_by_zero", "bad row of the user"):
        run_far(start(tmp_path, use_tpu), verb, loaded(divides_by_zero))
    if verb == "train":
        assert verified_steps(tmp_path)[-1] == 6


def exits(x):
    sys.exit(3)


def dies(x):
    os.kill(os.getpid(), signal.SIGKILL)


def leaves(x):
    os._exit(0)


@pytest.mark.parametrize(("verb", "happens", "text"), [
    ("train", exits, r"pid \d+ exited with code 3\. With num_workers=0 its error shows here"),
    ("train", dies, r"pid \d+ was killed by SIGKILL\. The machine may have run out of memory"),
    ("evaluate", exits, r"pid \d+ exited with code 3"), ("predict", dies, r"pid \d+ was killed by SIGKILL"),
    pytest.param("train", leaves, r"pid \d+ exited with code 0", marks=pytest.mark.slow)])
def test_fault_29_a_loader_worker_that_exits_or_is_killed_ends_the_run_and_is_named(tmp_path, verb, happens, text):
    with fault(InputError, "^a worker process of the DataLoader died: ", text):
        run_far(start(tmp_path), verb, loaded(happens))
    if verb == "train":
        assert verified_steps(tmp_path)[0] == 0


@both_paths
@every_verb
def test_fault_29_workers_end_with_a_run_that_ends_before_its_input(tmp_path, use_tpu, verb):
    trainer = start(tmp_path, use_tpu)
    with nothing_left():
        if verb == "train":
            trainer.train(loaded(divides_by_zero), steps=3)
        elif verb == "evaluate":
            trainer.evaluate(loaded(divides_by_zero), steps=3)
        else:
            rows = trainer.predict(loaded(divides_by_zero, prefetch_factor=1))
            assert next(rows)["outputs"].shape == (1,)
            rows.close()


def test_fault_29_workers_end_with_a_run_whose_first_batch_is_refused(tmp_path):
    with fault(InputError, "batch size should not be greater than batch_size, 2"):
        start(tmp_path).train(lambda params: DataLoader(Rows(divides_by_zero), batch_size=4, num_workers=2), steps=1)


def test_fault_29_workers_of_the_first_call_of_input_fn_end_where_the_second_fails(tmp_path, monkeypatch):
    use_fake(monkeypatch, 2)

    def input_fn(params, input_context):
        if input_context.input_pipeline_id:
            raise KeyError("second call")
        return loaded(divides_by_zero)(params)

    trainer = make_trainer(tmp_path, on_x, train_batch_size=4, config=make_config(
        tpu_config=TPUConfig(per_host_input_for_training=False)))
    with fault(KeyError, "second call"):
        trainer.train(input_fn, steps=1)


def test_fault_29_a_signal_for_the_group_of_processes_leaves_the_workers_to_the_training(tmp_path):
    groups = []

    class Groups(Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return {"x": torch.tensor([float(os.getpgid(0))])}, torch.zeros(1)

    def notes(features, labels, mode, params, model, optimizer):
        return on_x(features, labels, mode, params, model, optimizer).replace(
            host_call=(lambda x: groups.extend(x.flatten().tolist()), [features["x"] * 1]))

    make_trainer(tmp_path, notes).evaluate(lambda params: DataLoader(Groups(), batch_size=2, num_workers=2))
    assert len(set(groups)) == 2 and float(os.getpgid(0)) not in groups


@both_paths
@every_verb
@pytest.mark.parametrize("source", [lambda: [], lambda: iter(()), lambda: TensorDataset(torch.ones(0, 1)),
                                    lambda: DataLoader(TensorDataset(torch.ones(0, 1)), num_workers=1)],
                         ids=["list", "iterator", "Dataset", "DataLoader"])
def test_fault_39_an_empty_input_says_so(tmp_path, use_tpu, verb, source):
    with fault(InputError, "^input_fn yielded no batches. The dataset is empty, or was read to its end before"):
        run_far(start(tmp_path, use_tpu), verb, lambda params: source())


@both_paths
def test_fault_40_an_input_that_ends_early_saves_what_was_trained_and_ends_cleanly(tmp_path, use_tpu, capsys):
    trainer = make_trainer(tmp_path, on_x, use_tpu=use_tpu, config=make_config(show_progress=True))
    with nothing_left():
        trainer.train(lambda params: DataLoader(Rows(lambda x: x), batch_size=2, num_workers=2), steps=100)
    assert trainer.global_step() == 12
    assert verified_steps(tmp_path)[-1] == 12
    assert "the input ended at step 12 of 100" in capsys.readouterr().out


@both_paths
def test_fault_40_evaluation_counts_what_there_was(tmp_path, use_tpu):
    def counts(features, labels, mode, params, model, optimizer):
        return make_spec(mode, model(features["x"]), labels, optimizer,
                         eval_metrics=(lambda x: {"mean_x": x.squeeze(1)}, [features["x"] * 1]))

    trainer = make_trainer(tmp_path, counts, use_tpu=use_tpu)
    with nothing_left():
        result = trainer.evaluate(lambda params: DataLoader(Rows(lambda x: x), batch_size=2, num_workers=2), steps=100)
    assert result["mean_x"] == (NUM_ROWS - 1) / 2


@pytest.mark.parametrize("mode", [ModeKeys.TRAIN, ModeKeys.EVAL])
def test_fault_41_calls_of_uneven_length_agree_on_the_stop(tmp_path, monkeypatch, mode):
    """Two replicas with an input each; several hosts are tests/hosts/test_training.py's."""
    from tests.data.test_pipeline import PER_SHARD_V1, pipeline, real_rows

    if mode is ModeKeys.TRAIN:
        made = pipeline(lambda params, input_context: iter([torch.ones(2)] * (3 - input_context.input_pipeline_id)),
                        mode=mode, deployment=PER_SHARD_V1)
        assert len(list(made)) == 2
    else:
        made = pipeline(lambda params: iter([torch.ones(2)] * 3), mode=mode,
                        deployment=InputPipelineConfig.PER_HOST_V2)
        assert len(real_rows(list(made))) == 6


def wider(x):
    return torch.cat([x, x])


@every_verb
def test_fault_42_a_shape_that_changes_is_named_old_and_new_and_nothing_is_compiled_for_it(tmp_path, verb):
    from tests.regression import num_compiles

    trainer = start(tmp_path)
    run(trainer, verb, loaded(lambda x: x))
    before = num_compiles()
    with fault(InputError, r"features\['x'\] changed from \[batch, 1\] to \[batch, 2\]", "Pad to one shape"):
        run_far(trainer, verb, loaded(wider))
    assert num_compiles() == before


@every_verb
def test_fault_42_a_key_that_appears_later_is_named(tmp_path, verb):
    first, later = {"x": torch.ones(2, 1)}, {"x": torch.ones(2, 1), "extra": torch.ones(2, 1)}
    with fault(InputError, r"missing: \[\], new: \[\"features\['extra'\]\"\]"):
        run_far(start(tmp_path), verb, lambda params: [(part, torch.zeros(2, 1)) for part in (first, first, later)])


@both_paths
@every_verb
@pytest.mark.parametrize(("leaf", "got"), [
    (np.array(["one", None], dtype=object), "got dtype object"), (np.array(["a", "b"]), "got dtype <U1"),
    (["a", "b"], r"features\['x'\]\[0\] must be a tensor or an array \[batch, ...\]; got str")],
    ids=["object", "string", "list of strings"])
def test_fault_43_what_is_no_number_is_named(tmp_path, use_tpu, verb, leaf, got):
    with fault(InputTypeError, r"^features\['x'\]", got):
        run_far(start(tmp_path, use_tpu), verb, lambda params: [({"x": leaf}, torch.zeros(2, 1))])


@every_verb
def test_fault_43_another_nesting_is_named(tmp_path, verb):
    first, later = {"x": torch.ones(2, 1)}, {"x": {"deep": torch.ones(2, 1)}}
    with fault(InputError, r"missing: \[\"features\['x'\]\"\], new: \[\"features\['x'\]\['deep'\]\"\]"):
        run_far(start(tmp_path), verb, lambda params: [(part, torch.zeros(2, 1)) for part in (first, later)])


@both_paths
@pytest.mark.parametrize("verb", ["train", "evaluate"])
@pytest.mark.parametrize(("labels", "got"), [(torch.zeros(3, 1), r"got shape \[3, 1\]"),
                                             (torch.tensor(0.0), "got a scalar")], ids=["rows", "scalar"])
def test_fault_44_what_is_not_batch_major_is_named(tmp_path, use_tpu, verb, labels, got):
    with fault(InputError, "^labels must be batch-major", got):
        run_far(start(tmp_path, use_tpu), verb, lambda params: [({"x": torch.ones(2, 1)}, labels)])


@every_verb
def test_fault_45_a_scalar_tensor_of_host_call_is_named_with_the_mend(tmp_path, verb):
    def scalar(features, labels, mode, params, model, optimizer):
        return on_x(features, labels, mode, params, model, optimizer).replace(
            host_call=(lambda level: None, {"level": features["x"].sum()}))

    with fault(SpecUsageError, "got scalar 'level'", r"Reshape it to \[1\]: tensor.reshape\(1\)"):
        run_far(make_trainer(tmp_path, scalar), verb, loaded(lambda x: x))


@pytest.mark.parametrize(("size", "replicas", "nearest"), [(127, 2, 128), (1, 4, 4), (9, 4, 8)])
def test_fault_46_a_batch_that_replicas_do_not_divide_is_told_the_nearest(tmp_path, monkeypatch, size, replicas,
                                                                         nearest):
    use_fake(monkeypatch, replicas)
    trainer = make_trainer(tmp_path, on_x, train_batch_size=size)
    with fault(ConfigError, f"train batch size {size} must be divisible by number of replicas {replicas}",
               rf"Try {nearest}\."):
        trainer.train(lambda params: pytest.fail("was called"), steps=1)


@pytest.mark.slow
def test_fault_46_the_command_ends_with_2_before_it_compiles(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tpuspec.train", "config=digits", "tpu.num_shards=4", "train_batch_size=67",
         f"model_dir={tmp_path / 'run'}"], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={name: value for name, value in os.environ.items() if name != "CPU_NUM_DEVICES"})
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: train batch size 67 must be divisible by number of replicas 4. Try 68.")
    assert "Traceback" not in done.stderr


def test_forked_workers_say_nothing_of_their_own(tmp_path, caplog):
    with caplog.at_level(logging.WARNING), nothing_left():
        start(tmp_path).train(loaded(lambda x: x), steps=4)
    assert caplog.messages == []
