import numpy as np
import pytest
import torch

import tpuspec
from tpuspec import ModeKeys
from tpuspec.recipes import tabular

PARAMS = {"width": 32, "dropout": 0.2, "learning_rate": 0.003, "weight_decay": 0.01}


def test_split_holds_every_row_once_and_is_stratified():
    (x, weights, labels), (test_x, test_weights, test_labels) = map(tabular.load_split, ("train", "eval"))
    assert (len(x), len(test_x)) == (426, 143)
    assert len({tuple(row) for row in torch.cat([x, test_x]).tolist()}) == 569
    assert labels.mean().item() == pytest.approx(test_labels.mean().item(), abs=0.005)
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-5)
    assert weights.mean().item() == pytest.approx(1)
    for classes, row_weights in ((labels, weights), (test_labels, test_weights)):
        assert row_weights[classes == 1].unique().numel() == row_weights[classes == 0].unique().numel() == 1
    assert weights[labels == 1].sum().item() == pytest.approx(weights[labels == 0].sum().item(), rel=1e-4)


def test_predict_input_has_no_label():
    assert set(tabular.input_fn(PARAMS, ModeKeys.PREDICT)[0]) == {"x", "weight"}


@pytest.mark.slow
def test_it_trains_to_its_score(tmp_path):
    trainer = tpuspec.Trainer(
        tabular.model_fn, model=tabular.model, optimizer=tabular.optimizer, params=PARAMS, model_dir=tmp_path,
        train_batch_size=64, eval_batch_size=64, predict_batch_size=64,
        config=tpuspec.RunConfig(seed=1, show_progress=False, save_checkpoints_secs=None))
    result = trainer.train(tabular.input_fn, max_steps=600).evaluate(tabular.input_fn)
    assert result["auc"] >= 0.985
    assert result["accuracy"] >= 0.95 and result["recall"] >= 0.9
    labels = tabular.load_split("eval")[2].numpy()
    scores = np.array([row["malignant"] for row in trainer.predict(tabular.input_fn)])
    from sklearn.metrics import accuracy_score, roc_auc_score

    assert result["accuracy"] == accuracy_score(labels, scores > 0.5)
    assert result["auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
