"""tpuspec/recipes/tabular on four replicas reaches its score."""

from __future__ import annotations

import pytest

import tpuspec
from tests.recipes.test_tabular import PARAMS
from tpuspec.recipes import tabular


@pytest.mark.slow
def test_four_replicas_reach_the_score(tmp_path):
    trainer = tpuspec.Trainer(
        tabular.model_fn, model=tabular.model, optimizer=tabular.optimizer, params=PARAMS, model_dir=tmp_path,
        train_batch_size=64, eval_batch_size=64, predict_batch_size=64,
        config=tpuspec.RunConfig(seed=1, show_progress=False, save_checkpoints_secs=None,
                                 tpu_config=tpuspec.TPUConfig(num_shards=4, iterations_per_loop=100)))
    result = trainer.train(tabular.input_fn, max_steps=600).evaluate(tabular.input_fn)
    assert result["auc"] >= 0.985
