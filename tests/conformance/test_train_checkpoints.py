"""Rows TRAIN-08 .. TRAIN-10 of the conformance list: which checkpoints a training leaves, and who hears of them."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from tests.regression import make_trainer, rows_input
from tpuspec import CheckpointSaverListener


def checkpoints(model_dir) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in model_dir.glob("checkpoint-*"))


class Recorder(CheckpointSaverListener):
    def __init__(self):
        self.before: list[int] = []
        self.after: list[int] = []

    def before_save(self, global_step):
        self.before.append(global_step)

    def after_save(self, global_step):
        self.after.append(global_step)


def test_train_08_five_steps_twice_end_at_10_and_train_returns_the_trainer(tmp_path):
    trainer = make_trainer(tmp_path)
    assert trainer.train(rows_input(), steps=5) is trainer
    assert checkpoints(tmp_path) == [0, 5]
    assert trainer.get_variable_value("global_step") == 5
    trainer.train(rows_input(), steps=5)
    assert trainer.get_variable_value("global_step") == 10


def test_train_08_a_moved_model_dir_resumes(tmp_path):
    trainer = make_trainer(tmp_path / "here").train(rows_input(), steps=5)
    weight = trainer.get_variable_value("weight")
    shutil.move(tmp_path / "here", tmp_path / "there")
    moved = make_trainer(tmp_path / "there")
    np.testing.assert_array_equal(moved.get_variable_value("weight"), weight)
    assert moved.train(rows_input(), steps=5).global_step() == 10


def test_train_09_saves_come_at_the_start_at_their_distance_and_at_the_end(tmp_path):
    recorder = Recorder()
    make_trainer(tmp_path, save_checkpoints_steps=10).train(
        rows_input(), max_steps=26, saving_listeners=[recorder])
    assert recorder.before == recorder.after == checkpoints(tmp_path) == [0, 10, 20, 26]


def test_train_09_a_training_that_goes_on_saves_no_first_one_again(tmp_path):
    saved = []
    for _ in range(5):
        recorder = Recorder()
        make_trainer(tmp_path, save_checkpoints_steps=10, iterations_per_loop=5).train(
            rows_input(), steps=5, saving_listeners=[recorder])
        saved.append(recorder.after)
    # The end of each training is saved, as its last step is not saved yet.
    assert saved == [[0, 5], [10], [15], [20], [25]]


@pytest.mark.parametrize("use_tpu", [True, False])
def test_train_10_listeners_without_saves_are_a_value_error(tmp_path, use_tpu):
    trainer = make_trainer(tmp_path, use_tpu=use_tpu, save_checkpoints_steps=None, save_checkpoints_secs=None)
    with pytest.raises(ValueError, match="There should be a CheckpointSaverHook to use saving_listeners"):
        trainer.train(rows_input(), max_steps=2, saving_listeners=[Recorder()])


@pytest.mark.parametrize("listeners", [[object()], [Recorder]])
def test_train_10_what_is_no_listener_is_a_type_error(tmp_path, listeners):
    with pytest.raises(TypeError, match="must be a list of CheckpointSaverListener"):
        make_trainer(tmp_path).train(rows_input(), max_steps=2, saving_listeners=listeners)
