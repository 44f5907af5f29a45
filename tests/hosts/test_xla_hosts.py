"""Several processes of XLA devices compute what one computes: replicas, a mesh over all of them, failures, resume."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.checkpoints import damaged_steps
from tpuspec.checkpoint.store import CheckpointStore

pytestmark = pytest.mark.slow

STEPS, ROWS = 50, 101
LAYOUTS = {
    "replicas": {},
    "data and model": {"mesh": {"data": 2, "model": 2}, "sharding": {"0.weight": ["model", None], "0.bias": ["model"]}},
    "fsdp": {"mesh": {"data": 4}, "fsdp": True},
}


def close(a, b, most=1e-5):
    return np.abs(np.asarray(a) - np.asarray(b)).max() <= most


@pytest.mark.parametrize(("hosts", "devices", "layout"), [
    (2, 2, "replicas"), (2, 2, "fsdp")])  # test_matrix.py has others
def test_processes_equal_one_on_the_same_global_batch(run_xla_hosts, run_hosts, hosts, devices, layout):
    (one,) = run_hosts(1, "train,evaluate,predict").results()
    several = {"steps_per_execution": 5} if layout in ("replicas", "fsdp") else {}
    results = run_xla_hosts(hosts, "train,evaluate,predict", devices=devices, tpu=LAYOUTS[layout] | several).results()
    chief, *others = results
    assert close(chief["losses"], one["losses"])
    assert chief["host_call_rows"] == one["host_call_rows"]
    assert chief["predictions"] == one["predictions"]
    for result in results:
        assert close(result["weights"], one["weights"])
        assert result["evaluations"] == chief["evaluations"]
        assert result["evaluations"][0]["accuracy"] == one["evaluations"][0]["accuracy"]
        assert result["evaluations"][0]["loss"] == pytest.approx(one["evaluations"][0]["loss"], abs=1e-6)
        assert (result["step"], result["step_kind"]) == (STEPS, "replay")
    for other in others:
        assert (other["predictions"], other["host_calls"], other["files"]) == ([], [], [])


@pytest.mark.parametrize("layout", ["replicas", "data and model"])
def test_hosts_with_uneven_shares_end_together_with_exact_metrics(run_xla_hosts, run_hosts, layout):
    (one,) = run_hosts(1, "evaluate,predict").results()
    results = run_xla_hosts(2, "evaluate,train,evaluate,predict", steps=2000, uneven=1, devices=2,
                            tpu=LAYOUTS[layout]).results()
    assert len({result["step"] for result in results}) == 1
    assert results[0]["step"] < 20
    assert results[1]["evaluations"] == results[0]["evaluations"]
    assert results[0]["evaluations"][0]["accuracy"] == one["evaluations"][0]["accuracy"]
    assert results[0]["evaluations"][0]["loss"] == pytest.approx(one["evaluations"][0]["loss"], abs=1e-6)
    assert sorted(results[0]["predictions"]) == sorted(one["predictions"])


@pytest.mark.parametrize("layout", ["replicas", "data and model"])
def test_a_run_goes_on_from_the_chiefs_checkpoint_bit_for_bit(run_xla_hosts, layout):
    settings = {"save": 10, "noisy": 1, "devices": 2, "tpu": LAYOUTS[layout]}
    whole = run_xla_hosts(2, "train", **settings).results()
    outcome = run_xla_hosts(2, "train,resume", steps=20, **settings)
    results = outcome.results()
    assert [name for name in results[0]["files"] if name.endswith("checkpoint-20")]
    assert results[0]["losses"] == whole[0]["losses"]
    for result, uninterrupted in zip(results, whole, strict=True):
        assert result["step"] == STEPS
        assert result["weights"] == uninterrupted["weights"]
        assert result["buffers"] == uninterrupted["buffers"]
    # The others do not see its folder.
    assert outcome.stderr(0).count("do not all see the chief's model_dir") == 2 * (layout != "replicas")
    assert "do not all see" not in outcome.stderr(1)
    assert results[1]["files"] == []


def told(outcome, host: int) -> str:
    """The line of a host's error."""
    (line, *_) = re.findall(r"^.*(?:HostFailureError: |error: )(.*)$", outcome.stderr(host), re.MULTILINE)
    return line


@pytest.mark.parametrize(("options", "code", "error"), [
    ({"fail": "input_fn"}, 1, r"failed in input_fn: .*ValueError: made to fail in input_fn"),
    ({"fail": "host_call", "host": 0}, 1, r"failed in host_call: .*made to fail in host_call"),
    ({"fail": "input_fn", "how": "kill"}, -9, r"it ended without a word \(killed"),
    ({"fail": "input_fn", "how": "kill", "host": 0}, -9, r"it ended without a word \(killed"),
    ({"fail": "input_fn", "how": "stop", "heartbeat": 10.0}, -9, r"it has been silent for \d"),
], ids=["input_fn", "host_call", "killed", "chief killed", "stopped"])
def test_a_process_that_fails_ends_all_and_is_named(run_xla_hosts, options, code, error):
    failing = options.get("host", 1)
    outcome = run_xla_hosts(3, "train", steps=100_000, save=5, **options)
    assert outcome.codes[failing] == code
    assert outcome.seconds < 30.0
    for host in {0, 1, 2} - {failing}:
        assert outcome.codes[host] == 1
        assert re.match(rf"host {failing} of 3 \(.*\)", told(outcome, host))
        assert re.search(error, told(outcome, host))


def test_a_signal_to_one_host_stops_all_after_one_save(run_xla_hosts):
    outcome = run_xla_hosts(3, "train", steps=100_000, fail="input_fn", how="term", host=1, save=1000)
    assert outcome.codes == [143, 143, 143], outcome.stderr(0)
    assert outcome.seconds < 30.0
    store = CheckpointStore(outcome.out / "run0")
    assert {int((outcome.out / f"step{host}").read_text()) for host in range(3)} == {store.steps()[-1]} != {0}
    assert damaged_steps(store) == []


def test_the_tasks_of_srun_find_one_another(run_xla_hosts, run_hosts):
    (one,) = run_hosts(1, "train").results()
    for results in (run_xla_hosts(2, "train", launcher="srun").results(),
                    run_hosts(2, "train", launcher="srun").results()):
        assert len(results) == 2
        for result in results:
            assert close(result["weights"], one["weights"])
