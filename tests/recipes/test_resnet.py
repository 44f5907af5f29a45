"""The ResNet recipe: its networks, its augmentation, and its loaders on small files in the real formats."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tpuspec import ModeKeys
from tpuspec.recipes import image_data, resnet
from tpuspec.train import main

PARAMS = {"data": "digits", "size": "small", "side": 8, "num_classes": 10, "least_area": 0.08, "label_smoothing": 0.1,
          "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.01, "warm_up_steps": 4, "schedule_steps": 20}


@pytest.fixture
def cifar_10(tmp_path):
    """Three files of training images and one of test images; an image's first byte tells its label."""
    generator = np.random.default_rng(0)
    for name, num_rows in (("data_batch_1.bin", 3), ("data_batch_2.bin", 2), ("test_batch.bin", 4)):
        rows = generator.integers(0, 256, (num_rows, 3073), dtype=np.uint8)
        rows[:, 0] = np.arange(num_rows)
        rows[:, 1] = rows[:, 0] + 100
        rows.tofile(tmp_path / name)
    return tmp_path


@pytest.fixture
def folder(tmp_path):
    """Red cats and blue dogs, as JPEG and PNG of several sizes."""
    for part, num_files in (("train", 4), ("val", 2)):
        for label, (name, colour) in enumerate((("cat", (250, 5, 5)), ("dog", (5, 5, 250)))):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(num_files):
                size = (40 + 10 * number, 30 + 5 * label)
                Image.new("RGB", size, colour).save(
                    tmp_path / part / name / f"{number}.{'jpg' if number % 2 else 'png'}", quality=95)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    return tmp_path


@pytest.mark.parametrize(("size", "num_parameters"), [("resnet18", 11_689_512), ("resnet50", 25_557_032)])
def test_a_size_is_torchvisions_and_needs_no_memory(size, num_parameters):
    with torch.device("meta"):
        model = resnet.model(PARAMS | {"size": size, "num_classes": 1000})
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    names = set(model.state_dict())
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer2.0.downsample.1.num_batches_tracked",
            "layer4.1.bn2.bias", "fc.bias"} <= names
    with pytest.raises(ValueError, match="params.size must be small, resnet20, resnet18, resnet50; got 51"):
        resnet.model(PARAMS | {"size": 51})


@pytest.mark.parametrize(("size", "side"), [("small", 8), ("resnet20", 32), ("resnet50", 64)])
def test_logits_are_finite_and_a_block_begins_as_its_shortcut(size, side):
    torch.manual_seed(0)
    model = resnet.model(PARAMS | {"size": size}).eval()
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    with torch.no_grad():
        assert model(images).shape == (2, 10) and model(images).isfinite().all()
        inputs = model.layer1[-1].conv1.in_channels
        x = torch.rand(1, inputs, 8, 8)
        if model.layer1[-1].downsample is None:
            assert torch.equal(model.layer1[-1](x), x)


def test_pad_and_crop_moves_by_up_to_the_padding_and_mirrors_half():
    image = torch.arange(1, 17, dtype=torch.uint8).reshape(1, 4, 4)
    drawn = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.9])
    moved = image_data.pad_and_crop(image, drawn, 1, flips=True)
    assert moved.tolist() == [[[0, 0, 0, 0], [0, 1, 2, 3], [0, 5, 6, 7], [0, 9, 10, 11]]]
    assert torch.equal(image_data.pad_and_crop(image, torch.full((5,), 0.5), 1, flips=True), image)
    mirrored = torch.tensor([0.5, 0.5, 0.0, 0.0, 0.1])
    assert torch.equal(image_data.pad_and_crop(image, mirrored, 1, flips=True), image.flip(2))
    assert torch.equal(image_data.pad_and_crop(image, mirrored, 1, flips=False), image)
    torch.manual_seed(0)
    moves = (image_data.pad_and_crop(image, image_data.draw(), 1, flips=True) for _ in range(300))
    places = {tuple(moved.flatten().tolist()) for moved in moves}
    assert len(places) == 18  # nine places, mirrored or not


def test_a_random_crop_lies_within_the_image_and_has_a_share_of_its_area():
    columns = torch.arange(60).expand(3, 40, 60).to(torch.uint8)
    torch.manual_seed(0)
    widths = []
    for _ in range(100):
        crop = image_data.random_resized_crop(columns, image_data.draw(), 16, 0.08)
        assert crop.shape == (3, 16, 16) and crop.dtype is torch.uint8 and int(crop.max()) <= 59
        widths.append(abs(int(crop[0, 8, 15]) - int(crop[0, 8, 0])))
    assert min(widths) < 20 and max(widths) > 45
    whole = image_data.random_resized_crop(columns, torch.tensor([0.999, 0.5, 0.0, 0.0, 0.9]), 16, 0.999)
    assert whole[0, 8, 0] < whole[0, 8, 15]
    assert image_data.resize_and_center_crop(columns, 14).shape == (3, 14, 14)
    middle = image_data.resize_and_center_crop(columns, 14)[0, 7].float()
    assert float(middle.mean()) == pytest.approx(29.5, abs=1.5)


def test_cifar_files_are_read_as_they_are_laid_out(cifar_10):
    images, labels = image_data.load_cifar(cifar_10, ModeKeys.TRAIN)
    assert images.shape == (5, 3, 32, 32) and labels.tolist() == [0, 1, 2, 0, 1]
    assert images[:, 0, 0, 0].tolist() == [100, 101, 102, 100, 101]
    raw = np.fromfile(cifar_10 / "data_batch_2.bin", dtype=np.uint8)
    assert images[3, 2, 31, 31] == raw[3072] and images[3, 1, 0, 0] == raw[1 + 1024]
    test = resnet.input_fn(PARAMS | {"data": str(cifar_10), "side": 32}, ModeKeys.EVAL)
    assert len(test) == 4 and test[3][1] == 3 and torch.equal(test[3][0], image_data.load_cifar(cifar_10, "eval")[0][3])
    with pytest.raises(ValueError, match="params.side=8, and these images have 32"):
        resnet.input_fn(PARAMS | {"data": str(cifar_10)}, ModeKeys.EVAL)
    (cifar_10 / "data_batch_3.bin").write_bytes(b"12345")
    with pytest.raises(ValueError, match="data_batch_3.bin has 5 bytes, which is no multiple of 3073"):
        image_data.load_cifar(cifar_10, ModeKeys.TRAIN)


def test_cifar_100_has_its_fine_labels(tmp_path):
    rows = np.zeros((2, 3074), dtype=np.uint8)
    rows[:, 0], rows[:, 1], rows[:, 2] = [7, 8], [70, 99], [1, 2]
    rows.tofile(tmp_path / "train.bin")
    images, labels = image_data.load_cifar(tmp_path, ModeKeys.TRAIN)
    assert labels.tolist() == [70, 99] and images[:, 0, 0, 0].tolist() == [1, 2]
    with pytest.raises(ValueError, match="has 100 classes, and params.num_classes is 10"):
        resnet.input_fn(PARAMS | {"data": str(tmp_path), "side": 32}, ModeKeys.TRAIN)
    with pytest.raises(FileNotFoundError, match=r"has no test_batch.bin of CIFAR-10 and no test.bin of CIFAR-100"):
        image_data.load_cifar(tmp_path, ModeKeys.EVAL)


def test_an_image_folder_is_read_by_class_the_same_on_threads_and_one_by_one(folder):
    params = PARAMS | {"data": str(folder), "side": 16}
    train, test = (resnet.input_fn(params, mode) for mode in (ModeKeys.TRAIN, ModeKeys.EVAL))
    assert (len(train), len(test)) == (8, 4)
    for image, label in test:
        assert image.shape == (3, 16, 16) and image.dtype is torch.uint8
        assert int(image[2 * label].min()) > 200 > 50 > int(image[2 - 2 * label].max())
    torch.manual_seed(1)
    together = train.__getitems__([5, 0, 3])
    torch.manual_seed(1)
    for (image, label), index in zip(together, [5, 0, 3], strict=True):
        alone = train[index]
        assert torch.equal(image, alone[0]) and label == alone[1] == index // 4
    assert resnet.input_fn(params, ModeKeys.PREDICT)[0].shape == (3, 16, 16)


def test_folders_and_files_that_do_not_fit_are_refused(folder, monkeypatch):
    with pytest.raises(FileNotFoundError, match="there is no folder 'nowhere'"):
        resnet.input_fn(PARAMS | {"data": "nowhere"}, ModeKeys.TRAIN)
    with pytest.raises(ValueError, match="has 2 classes, and params.num_classes is 1"):
        resnet.input_fn(PARAMS | {"data": str(folder), "num_classes": 1}, ModeKeys.TRAIN)
    (folder / "train" / "cat" / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken.png is no image that can be decoded"):
        list(resnet.input_fn(PARAMS | {"data": str(folder), "side": 16}, ModeKeys.TRAIN))
    (folder / "val" / "bird").mkdir()
    (folder / "val" / "bird" / "x.png").write_bytes(b"")
    with pytest.raises(ValueError, match="has the class 'bird', which .*train has not"):
        resnet.input_fn(PARAMS | {"data": str(folder)}, ModeKeys.EVAL)
    with pytest.raises(FileNotFoundError, match="has no image files: they lie in a folder for each class"):
        image_data.find_files(folder / "train", ModeKeys.EVAL)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pillow"):
        image_data.decode(b"")


def test_rate_warms_up_and_falls_to_nothing_and_only_kernels_decay():
    model = resnet.model(PARAMS)
    optimizer = resnet.optimizer(model, PARAMS)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    assert all(p.ndim > 1 for p in optimizer.param_groups[0]["params"])
    schedule, rates = resnet.scheduler(optimizer, PARAMS), []
    for _ in range(21):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1]) and rates[20] == pytest.approx(0)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_labels_are_smoothed_in_training_only():
    torch.manual_seed(0)
    model = resnet.model(PARAMS)
    images, labels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), torch.arange(4)
    found = {}
    for smoothing in (0.0, 0.5):
        for mode in (ModeKeys.TRAIN, ModeKeys.EVAL):
            spec = resnet.model_fn(images, labels, mode, PARAMS | {"label_smoothing": smoothing}, model,
                                   resnet.optimizer(model, PARAMS), torch.tensor([0]))
            found[smoothing, mode] = spec.loss.mean().item()
    assert found[0.0, ModeKeys.EVAL] == found[0.5, ModeKeys.EVAL] == pytest.approx(found[0.0, ModeKeys.TRAIN])
    assert abs(found[0.5, ModeKeys.TRAIN] - found[0.0, ModeKeys.TRAIN]) > 1e-3


def test_the_command_learns_the_digits(tmp_path, capsys):
    assert main(["config=resnet", "run.max_steps=100", f"model_dir={tmp_path}"]) == 0
    assert float(re.search(r"evaluation at step 100: accuracy ([\d.]+)", capsys.readouterr().out)[1]) > 0.8


def test_the_config_of_resnet_50_needs_a_folder(folder, tmp_path, capsys):
    argv = ["config=resnet50", "device=cpu", "mode=train", "run.max_steps=1", "train_batch_size=2", "params.size=small",
            "run.save_checkpoints_steps=null", f"model_dir={tmp_path / 'run'}"]
    assert main(argv) == 1
    assert "params.data must be 'digits', or a folder of images" in capsys.readouterr().err
    assert main([*argv, f"params.data={folder}", "params.side=32"]) == 0
