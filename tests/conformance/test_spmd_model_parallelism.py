"""Rows MP-03 to MP-07: input_partition_dims on a mesh of devices; tests/test_several_devices.py runs them."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import nn

from tpuspec import CrossShardOptimizer, InputPipelineConfig, ModeKeys, RunConfig, TPUConfig, TPUEstimatorSpec, Trainer
from tpuspec.select import select
from tpuspec.spec.results import Batch

NUM_DEVICES = int(os.environ["SPMD_DEVICES"])


def conv(params):
    torch.manual_seed(0)
    return nn.Conv2d(1, 1, 3)


def model_fn(features, labels, mode, params, model, optimizer):
    image = features["image"] if isinstance(features, dict) else features
    image = image if image.ndim == 4 else image[:, None]
    output = model(image)[:, 0]
    if mode == ModeKeys.PREDICT:
        return TPUEstimatorSpec(mode, predictions={"output": output})
    loss = output.square().mean()
    return TPUEstimatorSpec(mode, loss=loss, train_op=CrossShardOptimizer(optimizer).minimize(loss))


def config(dims, cores=2):
    return RunConfig(seed=1, show_progress=False, capture="require", save_checkpoints_secs=None, tpu_config=TPUConfig(
        num_cores_per_replica=cores, num_shards=NUM_DEVICES // cores, input_partition_dims=dims, iterations_per_loop=4,
        per_host_input_for_training=InputPipelineConfig.PER_HOST_V2))


def make(dims, tmp_path, cores=2):
    replicas = NUM_DEVICES // cores
    return Trainer(model_fn, model=conv, optimizer=lambda model, params: torch.optim.SGD(model.parameters(), lr=0.1),
                   params={}, train_batch_size=replicas, eval_batch_size=replicas, predict_batch_size=replicas,
                   model_dir=tmp_path, config=config(dims, cores))


def batches(features, labels):
    """An input_fn of batches of one row a replica."""
    def input_fn(params):
        return [(features, labels)] * 24 if labels is not None else [features] * 24
    return input_fn


IMAGES = {"image": torch.ones(1, 8, 8), "mask": torch.ones(1, 8)}


@pytest.mark.parametrize(("dims", "match"), [
    ([{"image": [0, 0, 0]}],
     r"input_partition_dims\[0\] mismatched feature keys. Expected \['image', 'mask'\], got \['image'\]"),
    ([{"image": None, "other": [1, 2]}], r"\[0\] mismatched feature keys. Expected .*, got \['image', 'other'\]"),
    ([{"image": None, "mask": None}, {"wrong": None}],
     r"\[1\] mismatched label keys. Expected \['inner', 'y'\], got \['wrong'\]"),
    ([None, {"y": [1, 2], "inner": [1, 2]}], r"\[1\] mismatched the structure of labels"),
    ([None, {"y": [1, 2], "inner": [[1, 2], [1, 2], [1, 2]]}], r"\[1\] mismatched the structure of labels"),
])
def test_mp_03_keys_and_nesting_must_be_those_of_the_input(dims, match, tmp_path):
    labels = {"y": torch.ones(1, 4), "inner": [torch.ones(1, 4), torch.ones(1, 4)]}
    with pytest.raises(ValueError, match=match):
        make(dims, tmp_path).train(batches(IMAGES, labels), steps=1)


@pytest.mark.parametrize(("dims", "match"), [
    ([1, 0, 2], "All input partition dims must be >= 1"),
    ([1, -1, 2], "All input partition dims must be >= 1"),
    ([1, 2, 2], "The product of each input partition dim should equal to num_cores_per_replica"),
    ([1, 2], "Input partition dims must have the same number of dimensions"),
    ([1, 1, 2, 1], "Input partition dims must have the same number of dimensions"),
])
def test_mp_04_dims_must_be_positive_and_fit_the_cores_and_the_rank(dims, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        make([dims], tmp_path).train(batches(torch.ones(1, 8, 8), None), steps=1)


PARTS = [
    ((14, 5), [2, 1], [(7, 5)] * 2), ((5, 5), [4, 1], [(2, 5), (2, 5), (1, 5), (0, 5)]),
    ((14, 5), [4, 2], [(4, 3), (4, 2), (4, 3), (4, 2), (4, 3), (4, 2), (2, 3), (2, 2)])]


@pytest.mark.parametrize(("shape", "dims", "parts"), PARTS)
def test_mp_05_parts_are_of_equal_size_but_the_last_ones(shape, dims, parts):
    cores = dims[0] * dims[1]
    backend = select(config([dims], cores), use_tpu=True)
    backend.place(None)
    batch = torch.arange(float(np.prod(shape))).reshape(shape)
    (sent,) = backend.feed([Batch(features=batch)] * (NUM_DEVICES // cores))
    (array,) = sent.arrays
    of_replica = [-(-size // num) * num for size, num in zip(shape, dims, strict=True)]  # filled up
    found = []
    for part in sorted(array.addressable_shards, key=lambda part: part.device.id):
        starts = [(index.start or 0) % filled for index, filled in zip(part.index, of_replica, strict=True)]
        found.append(tuple(max(0, min(num, size - start))
                           for start, num, size in zip(starts, part.data.shape, shape, strict=True)))
    assert found == parts * (NUM_DEVICES // cores)


def test_mp_06_an_uneven_split_is_numerically_transparent(tmp_path):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 1, 321, 224, generator=generator)
    trainer = make([[1, 1, 2, 1]], tmp_path)
    (row,) = trainer.predict(lambda params: [image])
    assert row["output"].shape == (319, 222)
    expected = conv({})(image)[0, 0].detach()
    np.testing.assert_allclose(row["output"], expected.numpy(), atol=1e-5)

    trainer.train(batches(image, None), steps=4)
    reference = conv({})
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        reference(image).square().mean().backward()
        optimizer.step()
    for name, value in trainer._sessions[True].model_state().items():
        torch.testing.assert_close(value, reference.state_dict()[name], atol=1e-5, rtol=1e-5)


def test_mp_06_dims_of_one_element_leave_the_labels_whole():
    backend = select(config([[1, 2]]), use_tpu=True)
    backend.place(None)
    (sent,) = backend.feed([Batch(features=torch.ones(1, 4), labels=torch.ones(1, 6))] * (NUM_DEVICES // 2))
    features, labels = ([part.data.shape for part in array.addressable_shards] for array in sent.arrays)
    assert features == [(1, 2)] * NUM_DEVICES
    assert labels == [(1, 6)] * NUM_DEVICES


@pytest.mark.parametrize("label_dims", [None, {"y": None, "inner": [None, [1, 2]]}])
def test_mp_07_none_puts_a_tensor_on_every_core_of_its_replica(label_dims, tmp_path):
    backend = select(config([{"image": [1, 2, 1], "mask": None}, label_dims]), use_tpu=True)
    backend.place(None)
    labels = {"y": torch.ones(1, 4), "inner": [torch.ones(1, 4), torch.ones(1, 4)]}
    (sent,) = backend.feed([Batch(features=IMAGES, labels=labels)] * (NUM_DEVICES // 2))
    shapes = [{part.data.shape for part in array.addressable_shards} for array in sent.arrays]
    last = (1, 4) if label_dims is None else (1, 2)
    assert shapes == [{(1, 4, 8)}, {(1, 8)}, {(1, 4)}, {(1, 4)}, {last}]


def test_mp_07_features_may_be_one_tensor_and_input_fn_is_called_once_a_host(tmp_path):
    calls = []

    def input_fn(params):
        calls.append(params["batch_size"])
        return batches(torch.ones(1, 8, 8), None)(params)

    make([[1, 2, 1]], tmp_path).train(input_fn, steps=2)
    assert calls == [1]
