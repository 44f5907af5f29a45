"""Checkpoints of a mesh over several processes: each writes its own pieces, and reads what it needs on any layout."""

from __future__ import annotations

import re

import pytest
import torch

from tests.checkpoints import damaged_steps
from tests.hosts.test_xla_hosts import LAYOUTS, STEPS, close, told
from tpuspec.checkpoint.store import CheckpointStore

pytestmark = pytest.mark.slow

FSDP = {"mesh": {"data": 2}, "fsdp": True}


def test_each_process_has_its_pieces_only_and_a_run_goes_on_bit_for_bit(run_xla_hosts):
    settings = {"save": 10, "noisy": 1, "tpu": FSDP, "shared": 1}
    whole = run_xla_hosts(2, "train", **settings).results()
    outcome = run_xla_hosts(2, "train,resume", steps=20, watch=1, **settings)
    results = outcome.results()
    files = {name.partition("/")[2] for name in results[0]["files"] if name.startswith("checkpoint-20/")}
    assert files == {"manifest.json", "index.json", "state.json", *(
        f"process-0000{process}-{part}-00001.safetensors" for process in (0, 1) for part in ("model", "optimizer"))}
    assert results[0]["losses"] == whole[0]["losses"]
    for result, uninterrupted in zip(results, whole, strict=True):
        assert result["weights"] == uninterrupted["weights"]
        assert result["buffers"] == uninterrupted["buffers"]
        assert result["gathered"] == 0, "nothing was brought together to save or to restore"
    of_model = [[pair for pair in result["fetched"] if pair[1]] for result in results]
    assert len(of_model[0]) == len(of_model[1]) > 4
    for first, second in zip(*of_model, strict=True):
        own, others, total = first[0], second[0], first[1]
        assert max(own, others) < 0.75 * total, "each has a half of what is split, and the small rest"
        assert own + others >= total


def test_a_checkpoint_goes_on_on_another_layout_and_a_damaged_one_is_passed_over(run_xla_hosts, run_hosts):
    (one,) = run_hosts(1, "train").results()
    (out := run_xla_hosts(2, "train", steps=20, save=10, tpu=FSDP, shared=1)).results()
    store = CheckpointStore(out.out / "run")
    saved = store.load(store.path(20))
    assert torch.equal(torch.tensor(out.result(0)["weights"]), torch.cat([
        value.flatten() for value in saved.model.values()]))
    (file,) = (out.out / "run" / "checkpoint-20").glob("process-00001-optimizer-*")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    settings = {"shared": 1, "folder": out.out, "steps": STEPS}
    on_mesh = run_xla_hosts(2, "train", devices=2, tpu=LAYOUTS["data and model"], watch=1, **settings)
    for result in on_mesh.results():
        assert close(result["weights"], one["weights"])
        assert result["gathered"] == 0
    assert len(on_mesh.result(0)["losses"]) == STEPS - 10, "from step 10 on"
    assert "checksum mismatch in process-00001-optimizer" in on_mesh.stderr(0)
    for step in store.steps():
        if step > 10:
            store.delete(step)
    peeking = run_xla_hosts(2, "evaluate,train", tpu=FSDP, peek=1, **settings)
    (evaluated,) = run_hosts(1, "evaluate", **settings).results()
    of_ten = store.load(store.path(10)).model
    for result in peeking.results():
        assert result["at_begin"] == torch.cat([value.flatten() for value in of_ten.values()]).tolist()
        assert close(result["weights"], one["weights"])
        assert result["evaluations"][0]["accuracy"] == evaluated["evaluations"][0]["accuracy"]
        assert result["evaluations"][0]["loss"] == pytest.approx(evaluated["evaluations"][0]["loss"], abs=1e-6)
    for run in (run_hosts(1, "train", **settings), run_hosts(2, "train", **settings),
                run_xla_hosts(2, "train", **settings)):
        for result in run.results():
            assert close(result["weights"], one["weights"])
            assert result["step"] == STEPS


@pytest.mark.parametrize("host", [0, 1])
def test_a_process_that_is_killed_in_a_save_leaves_no_half_of_a_checkpoint(run_xla_hosts, host):
    outcome = run_xla_hosts(2, "train", steps=1000, save=10, fail="save", how="kill", host=host, tpu=FSDP, shared=1)
    assert outcome.codes[host] == -9
    assert outcome.codes[1 - host] == 1
    assert outcome.seconds < 30.0
    assert re.match(rf"host {host} of 2 .*it ended without a word", told(outcome, 1 - host))
    store = CheckpointStore(outcome.out / "run")
    assert store.steps() == [0]
    store.prepare()
    assert sorted(path.name for path in (outcome.out / "run").iterdir() if "checkpoint" in path.name) == [
        "checkpoint-0"]
    assert damaged_steps(store) == []
