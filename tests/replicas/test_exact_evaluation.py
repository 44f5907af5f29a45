"""On 1, 2 and 4 real replicas, with every deployment and any size: what one process gives on the whole set, one graph.

TPUSPEC_EXAMPLES=200 takes more examples than CI does.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss
from torch.utils.data import TensorDataset

from tests.models import make_config, make_trainer
from tests.parity.test_exact_evaluation import DEPLOYMENTS, NUM_CLASSES, configured, model_fn, table
from tests.regression import num_compiles
from tpuspec import InputPipelineConfig, Trainer
from tpuspec.errors import InputError

NUM_EXAMPLES = int(os.environ.get("TPUSPEC_EXAMPLES", "30"))
# Few shapes, each with many sizes: a Trainer compiles once for its shapes, and is used again.
PER_REPLICA = (1, 3, 8)
TRAINERS: dict[tuple[int, int, InputPipelineConfig], Trainer] = {}


@pytest.fixture(scope="module", autouse=True)
def folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as path:
        yield path
    TRAINERS.clear()


def trainer_of(folder: str, replicas: int, per_replica: int, deployment: InputPipelineConfig) -> tuple[Trainer, bool]:
    """Returns the Trainer of these shapes, and whether it is new."""
    key = (replicas, per_replica, deployment)
    is_new = key not in TRAINERS
    if is_new:
        size, tpu = replicas * per_replica, configured(deployment)
        tpu.num_shards = replicas
        TRAINERS[key] = make_trainer(
            f"{folder}/{replicas}-{per_replica}-{deployment.name}", model_fn, model=None, optimizer=None,
            train_batch_size=size, eval_batch_size=size, predict_batch_size=size, config=make_config(tpu_config=tpu))
    return TRAINERS[key], is_new


@pytest.mark.slow
@settings(max_examples=NUM_EXAMPLES, deadline=None, derandomize=True, database=None)
@given(num_rows=st.integers(0, 200), per_replica=st.sampled_from(PER_REPLICA), replicas=st.sampled_from([1, 2, 4]),
       deployment=st.sampled_from(DEPLOYMENTS))
@example(num_rows=200, per_replica=8, replicas=4, deployment=InputPipelineConfig.PER_HOST_V1)
@example(num_rows=1, per_replica=8, replicas=4, deployment=InputPipelineConfig.PER_HOST_V2)
@example(num_rows=33, per_replica=8, replicas=4, deployment=InputPipelineConfig.BROADCAST)
@example(num_rows=0, per_replica=1, replicas=2, deployment=InputPipelineConfig.SLICED)
def test_counts_means_rows_and_graphs_are_those_of_one_process(folder, num_rows, per_replica, replicas, deployment):
    trainer, is_new = trainer_of(folder, replicas, per_replica, deployment)
    logits, labels = table(num_rows)

    def input_fn(params):
        return TensorDataset(logits, labels)

    if num_rows == 0:
        for run in (trainer.evaluate, lambda input_fn: list(trainer.predict(input_fn))):
            with pytest.raises(InputError, match="input_fn yielded no batches"):
                run(input_fn)
        del TRAINERS[replicas, per_replica, deployment]  # its first evaluation is still to come
        return
    before = num_compiles()
    result = trainer.evaluate(input_fn)
    rows = np.stack([row["logits"] for row in trainer.predict(input_fn)])
    assert trainer._sessions[True].backend.topology.num_replicas == replicas
    # One for each mode; none where another Trainer of the process had the same graph.
    assert num_compiles() - before <= 2 * is_new
    guesses, chances = logits.argmax(1), logits.double().softmax(1).numpy()
    assert result["accuracy"] == accuracy_score(labels, guesses)
    cells = result["cells"] * num_rows
    np.testing.assert_allclose(cells, confusion_matrix(labels, guesses, labels=range(NUM_CLASSES)), rtol=0, atol=1e-9)
    assert result["loss"] == pytest.approx(log_loss(labels, chances, labels=range(NUM_CLASSES)), abs=1e-6, rel=1e-6)
    np.testing.assert_array_equal(rows, logits.numpy())


def evaluated_and_predicted(trainer: Trainer, num_rows: int) -> tuple[int, int]:
    """Returns the graphs that evaluate and predict have compiled."""
    def input_fn(params):
        return TensorDataset(*table(num_rows))

    before = num_compiles()
    trainer.evaluate(input_fn)
    between = num_compiles()
    assert len(list(trainer.predict(input_fn))) == num_rows
    return between - before, num_compiles() - between


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_one_graph_is_compiled_for_each_mode_whatever_the_sizes(tmp_path, replicas):
    per_replica = 10 + replicas  # shapes that no other test of the process has
    size = replicas * per_replica
    trainer, _ = trainer_of(str(tmp_path), replicas, per_replica, InputPipelineConfig.PER_HOST_V1)
    counts = [evaluated_and_predicted(trainer, num_rows) for num_rows in (2 * size, 1, 3 * size + 1, size - 1)]
    assert counts == [(1, 1), (0, 0), (0, 0), (0, 0)]


def test_trainers_of_other_numbers_of_replicas_take_turns(tmp_path):
    trainers = [trainer_of(str(tmp_path), replicas, 8, InputPipelineConfig.PER_HOST_V1)[0] for replicas in (1, 4, 2)]
    for _ in range(3):
        for trainer in trainers:
            evaluated_and_predicted(trainer, 100)
