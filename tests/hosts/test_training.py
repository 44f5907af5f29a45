"""Several processes compute what one computes: weights, losses, metrics, predictions."""

from __future__ import annotations

import numpy as np
import pytest

pytestmark = pytest.mark.slow

STEPS, ROWS = 50, 101
DEPLOYMENTS = ["PER_SHARD_V1", "PER_HOST_V1", "PER_HOST_V2", "SLICED", "BROADCAST"]


def close(a, b, most=1e-6):
    return np.abs(np.asarray(a) - np.asarray(b)).max() <= most


@pytest.mark.parametrize("hosts", [2, 3, 4])
def test_processes_equal_one_on_the_same_global_batch(run_hosts, hosts):
    (one,) = run_hosts(1, "train,evaluate,predict").results()
    results = run_hosts(hosts, "train,evaluate,predict,some").results()
    chief, *others = results
    assert close(chief["losses"], one["losses"])
    assert chief["host_calls"] == [[step, hosts, 24] for step in range(STEPS)]
    assert chief["host_call_rows"] == one["host_call_rows"]
    assert chief["predictions"] == one["predictions"]
    assert len(chief["predictions"]) == ROWS
    assert chief["some"] == one["predictions"][:30]
    for result in results:
        assert close(result["weights"], one["weights"])
        assert result["evaluations"] == chief["evaluations"]
        assert result["evaluations"][0]["accuracy"] == one["evaluations"][0]["accuracy"]
        assert close(result["evaluations"][0]["loss"], one["evaluations"][0]["loss"])
        assert not result["torch_xla"]
    for other in others:
        assert (other["predictions"], other["host_calls"], other["files"]) == ([], [], [])


@pytest.mark.parametrize("options", [{"accumulate": 3}, {"clip": 0.05}, {"callable": 1}])
def test_an_update_reduces_once_and_clips_what_is_reduced(run_hosts, options):
    (one,) = run_hosts(1, "train", steps=12, **options).results()
    for result in run_hosts(3, "train", steps=12, **options).results():
        assert close(result["weights"], one["weights"])


@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_hosts_with_uneven_shares_end_together_with_exact_metrics(run_hosts, deployment):
    (one,) = run_hosts(1, "evaluate,predict").results()
    results = run_hosts(3, "evaluate,train,evaluate,predict", steps=2000, uneven=1, deployment=deployment).results()
    assert len({result["step"] for result in results}) == 1
    assert results[0]["step"] < 20
    for result in results[1:]:
        assert close(result["weights"], results[0]["weights"], 0)
        assert result["evaluations"] == results[0]["evaluations"]
    # Of the initial weights, which are those of one process.
    untrained, expected = results[0]["evaluations"][0], one["evaluations"][0]
    assert untrained["accuracy"] == expected["accuracy"]
    assert untrained["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    if deployment in ("SLICED", "BROADCAST"):
        assert results[0]["predictions"] == one["predictions"]
    else:
        assert sorted(results[0]["predictions"]) == sorted(one["predictions"])
    rehearsed = 24 if deployment == "BROADCAST" else 8
    assert sum(results[0]["metric_rows"]) == 2 * ROWS + rehearsed


def test_a_stop_request_of_one_host_stops_all_at_one_step(run_hosts):
    results = run_hosts(3, "train", steps=2000, stop=17).results()
    assert [result["step"] for result in results] == [17, 17, 17]


def test_a_run_goes_on_from_the_chiefs_checkpoint_wherever_it_is(run_hosts):
    whole = run_hosts(3, "train", save=10, noisy=1, slow=1).results()
    results = run_hosts(3, "train,resume", steps=20, save=10, noisy=1, slow=1).results()
    assert [name for name in results[0]["files"] if name.endswith("checkpoint-20")]
    assert results[0]["losses"] == whole[0]["losses"]
    for result, uninterrupted in zip(results, whole, strict=True):
        assert result["step"] == STEPS
        assert result["weights"] == uninterrupted["weights"]  # bit for bit, dropout and momentum included
        assert result["noise"] == uninterrupted["noise"]
        assert result["prefetched"] and uninterrupted["prefetched"]
    assert results[1]["files"] == results[2]["files"] == []
    assert len({tuple(result["noise"]) for result in results}) == 3
