import pytest
import torch
from PIL import Image

import tpuspec
from tests.test_readme import ROOT
from tpuspec.recipes import dcgan

PARAMS = {"noise": 8, "width": 4, "learning_rate": 0.0015}


def make_trainer(folder, **config):
    return tpuspec.Trainer(
        dcgan.model_fn, model=dcgan.model, optimizer=dcgan.optimizer, params=PARAMS, model_dir=folder,
        train_batch_size=32, eval_batch_size=100, predict_batch_size=100, config=tpuspec.RunConfig(
            seed=1, show_progress=False,
            tpu_config=tpuspec.TPUConfig(iterations_per_loop=3, host_call_every_n_steps=2), **config))


def test_images_are_between_minus_1_and_1():
    images, classes = dcgan.load_images()
    assert images.shape == (1797, 1, 8, 8) and classes.shape == (1797,)
    assert (images.min(), images.max()) == (-1, 1)


def test_grid_shows_each_image_at_its_place():
    images = torch.full((dcgan.ROWS_OF_GRID * 10, 1, 8, 8), -1.0)
    images[13] = 1.0  # second row, fourth column
    grid = dcgan.to_grid(images)
    assert grid.shape == (1, dcgan.ROWS_OF_GRID * 10, 100)
    assert (grid == 1).nonzero()[[0, -1], 1:].tolist() == [[11, 31], [18, 38]]


def test_metric_reads_real_images_as_their_classes():
    images, classes = dcgan.load_images()
    metric, arguments = dcgan.metric_fn(classes, images)["read_as_asked"]
    metric.update(*arguments)
    assert metric.compute() > 0.98


@pytest.mark.slow
def test_both_networks_train_and_the_images_are_written(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train(dcgan.input_fn, max_steps=3)
    before = {name: trainer.get_variable_value(name) for name in trainer.get_variable_names()}
    trainer.train(dcgan.input_fn, max_steps=6)
    changed = {name for name in before if (trainer.get_variable_value(name) != before[name]).any()}
    assert {f"{network}.layers.0.weight" for network in ("generator", "discriminator")} <= changed
    assert not {"grid_noise", "grid_classes"} & changed
    assert (tmp_path / "metrics.jsonl").read_text().count("dcgan/generator_loss") == 3
    assert 0 <= trainer.evaluate(dcgan.input_fn)["read_as_asked"] <= 1
    rows = list(trainer.predict(dcgan.input_fn))
    assert len(rows) == dcgan.NUM_EVAL_IMAGES and rows[3]["classes"] == 3
    assert abs(rows[0]["images"]).max() <= 1


def test_each_network_has_its_own_optimizer():
    model = dcgan.model(PARAMS)
    made = dcgan.optimizer(model, PARAMS)
    for name, optimizer in made.items():
        assert set(optimizer.param_groups[0]["params"]) == set(getattr(model, name).parameters())
    assert set(made) == {"generator", "discriminator"}


def test_the_page_shows_a_grid():
    assert "](images/dcgan.png)" in (ROOT / "docs/dcgan.md").read_text()
    with Image.open(ROOT / "docs/images/dcgan.png") as image:
        assert image.size == (600, 240)
