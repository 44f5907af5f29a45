"""The recipes' exports give what their predictions are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_digits

import tpuspec
from tpuspec import ModeKeys
from tpuspec.recipes import dcgan, digits, tabular

PARAMS = {"width": 4, "dropout": 0.2, "noise": 8, "learning_rate": 0.002, "weight_decay": 0.01}


def received_by_tabular():
    _, _, _, test = tabular._load_rows()
    return {"measurements": load_breast_cancer().data[test].astype(np.float32)}


def received_by_dcgan():
    items = dcgan.input_fn(PARAMS, ModeKeys.PREDICT)
    return {name: torch.stack([items[i][name] for i in range(len(items))]) for name in ("noise", "classes")}


def received_by_digits():
    images = load_digits().images.astype(np.float32)
    kept = {tuple(image.flatten().tolist()) for image in digits.load_split("eval")[0] * 16}
    return {"image": np.stack([image for image in images if tuple(image.flatten().tolist()) in kept])}


@pytest.mark.parametrize(("recipe", "received", "name", "in_order"), [
    (digits, received_by_digits, "probabilities", False), (tabular, received_by_tabular, "malignant", True),
    (dcgan, received_by_dcgan, "images", True)], ids=["digits", "tabular", "dcgan"])
def test_an_export_serves_what_is_predicted(tmp_path, recipe, received, name, in_order):
    trainer = tpuspec.Trainer(
        recipe.model_fn, model=recipe.model, optimizer=recipe.optimizer, params=PARAMS, use_tpu=False,
        train_batch_size=16, predict_batch_size=100, config=tpuspec.RunConfig(seed=1, show_progress=False))
    trainer.train(recipe.input_fn, max_steps=2)
    served = tpuspec.export.load(trainer.export(tmp_path, recipe.serving_input_fn))(received())[name].numpy()
    predicted = np.stack([row[name] for row in trainer.predict(recipe.input_fn)])
    if not in_order:
        served, predicted = (values[np.lexsort(values.T)] for values in (served, predicted))
    np.testing.assert_allclose(served, predicted, rtol=1e-4, atol=1e-5)
