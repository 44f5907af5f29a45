"""batch_axis on real replicas: the slices of an inner axis reach the devices, and come back exactly."""

from __future__ import annotations

import pytest

from tests.data.test_batch_axis import column_batches, on_columns
from tests.models import make_config, make_trainer
from tpuspec import TPUConfig


@pytest.mark.parametrize("num_shards", [2, 4])
def test_an_inner_axis_is_split_over_replicas(num_shards, tmp_path):
    trainer = make_trainer(tmp_path, on_columns, model=None, optimizer=None, eval_batch_size=8, predict_batch_size=8,
                           train_batch_size=8, batch_axis=(1, 0),
                           config=make_config(tpu_config=TPUConfig(num_shards=num_shards)))
    assert trainer.evaluate(lambda params: column_batches(21, 8))["mean_sum"] == pytest.approx(110)
    rows = trainer.predict(lambda params: [x for x, _ in column_batches(21, 8)])
    assert [row["sum"].item() for row in rows] == [11 * i for i in range(21)]
