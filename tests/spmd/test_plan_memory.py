"""A plan's memory of arguments is what an engine really holds: digits on one device, on a mesh, and with fsdp."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tpuspec import ModeKeys, RunConfig, TPUConfig, Trainer
from tpuspec.recipes import digits
from tpuspec.spec.results import Batch

ROWS = 64


def input_fn(params, mode):
    data = TensorDataset(*digits.load_split(ModeKeys.TRAIN))
    return DataLoader(data, batch_size=params["batch_size"], drop_last=True)


def bytes_of_first_device(arrays):
    """Sums what the first device has of jax's arrays; all of those of numpy."""
    total = 0
    for array in arrays:
        shards = getattr(array, "addressable_shards", None)
        first = min(shard.device.id for shard in shards) if shards else None
        total += array.nbytes if shards is None else sum(
            shard.data.nbytes for shard in shards if shard.device.id == first)
    return total


@pytest.mark.parametrize("tpu", [
    {"mesh": {"data": 4}}, {"mesh": {"data": 4}, "fsdp": True},
    {"mesh": {"data": 2, "model": 2}, "sharding": {"9.weight": (None, "model")}, "steps_per_execution": 2},
    {"num_shards": 1}],  # the last one: on a CPU the first Trainer makes as many devices as it needs
    ids=["mesh", "fsdp", "model", "one"])
def test_the_memory_of_a_plan_is_what_the_engine_holds(tpu, tmp_path):
    trainer = Trainer(
        digits.model_fn, model=digits.model, optimizer=digits.optimizer, model_dir=tmp_path, train_batch_size=ROWS,
        params={"width": 16, "dropout": 0.25, "learning_rate": 0.002, "weight_decay": 0.01},
        config=RunConfig(seed=0, show_progress=False, save_checkpoints_steps=None, tpu_config=TPUConfig(**tpu)))
    trainer.train(input_fn, steps=8)
    (planned,) = trainer.plan(input_fn, topology="v5e:2x2").modes
    session = trainer._sessions[True]
    backend, (replica,), optimizer = session.backend, session.replicas, session.replicas[0].optimizers[""]
    held = {
        "parameters": list(replica.model.parameters()), "buffers": list(replica.model.buffers()),
        "optimizer state": [value for state in optimizer.state.values() for value in state.values()
                            if isinstance(value, torch.Tensor) and value.device.type == "xla"]}
    real = {kind: bytes_of_first_device(backend.arrays_of(tensors)) for kind, tensors in held.items()}
    assert len(held["optimizer state"]) == 2 * len(held["parameters"])
    rows = [torch.zeros(ROWS // backend.topology.num_replicas, *shape, dtype=dtype)
            for shape, dtype in (((1, 8, 8), torch.float32), ((), torch.int64))]
    batches = [Batch(features=rows[0], labels=rows[1])] * backend.topology.num_replicas
    real["batch"] = bytes_of_first_device(backend.feed(batches)[0].arrays) * planned.steps_per_program
    assert set(real) == set(planned.argument_bytes) - {"other"} and planned.argument_bytes["other"] < 200
    for kind, size in real.items():
        assert planned.argument_bytes[kind] == pytest.approx(size, rel=0.01), kind
    assert real["parameters"] > 0 and planned.compiles
