"""One of three processes fails, is killed, or is stopped: the others end soon, and their error names it."""

from __future__ import annotations

import re

import pytest

from tests.checkpoints import damaged_steps
from tpuspec.checkpoint.store import CheckpointStore

pytestmark = pytest.mark.slow

MOST_SECONDS = 30.0
HEARTBEAT_SECONDS = 10.0


def told(outcome, host: int) -> str:
    """The line of a host's error."""
    (line, *_) = re.findall(r"^.*(?:HostFailureError: |error: )(.*)$", outcome.stderr(host), re.MULTILINE)
    return line


@pytest.mark.parametrize(("place", "failing", "error"), [
    ("input_fn", 1, "ValueError: made to fail in input_fn"), ("input_fn", 0, "ValueError: made to fail in input_fn"),
    ("model_fn", 2, "ValueError: made to fail in model_fn"), ("host_call", 0, "made to fail in host_call")])
def test_an_exception_of_one_ends_all_and_is_named_by_all(run_hosts, place, failing, error):
    outcome = run_hosts(3, "train", steps=2000, fail=place, host=failing)
    assert outcome.codes == [1, 1, 1]
    assert outcome.seconds < MOST_SECONDS
    for host in {0, 1, 2} - {failing}:
        assert re.match(rf"host {failing} of 3 \(.*, pid \d+\) failed in {place}: .*{error}", told(outcome, host))
    assert "HostFailureError" not in outcome.stderr(failing)


def test_a_process_that_exits_is_no_silent_end(run_hosts):
    outcome = run_hosts(3, "train", steps=2000, fail="input_fn", how="exit")
    assert outcome.codes == [1, 7, 1]
    assert outcome.seconds < MOST_SECONDS
    for host in (0, 2):
        assert re.match(r"host 1 of 3 \(.*\) failed in .*: SystemExit: 7", told(outcome, host))


@pytest.mark.parametrize("failing", [0, 1])
def test_fault_26_a_killed_process_is_named_at_once(run_hosts, failing):
    outcome = run_hosts(3, "train", steps=2000, fail="input_fn", how="kill", host=failing, save=5)
    assert outcome.codes[failing] == -9
    assert outcome.seconds < MOST_SECONDS
    for host in {0, 1, 2} - {failing}:
        assert outcome.codes[host] == 1
        assert re.match(rf"host {failing} of 3 \(.*\) failed in [\w ]+: it ended without a word \(killed",
                        told(outcome, host))
    store = CheckpointStore(outcome.out / "run0")
    assert store.steps()
    assert damaged_steps(store) == []


def test_fault_25_a_signal_to_one_host_stops_all_after_one_save(run_hosts):
    outcome = run_hosts(3, "train", steps=2000, fail="input_fn", how="term", host=1, save=1000)
    assert outcome.codes == [143, 143, 143], outcome.stderr(0)
    assert outcome.seconds < MOST_SECONDS
    store = CheckpointStore(outcome.out / "run0")
    assert {int((outcome.out / f"step{host}").read_text()) for host in range(3)} == {store.steps()[-1]} != {0}
    assert damaged_steps(store) == []


@pytest.mark.parametrize("failing", [0, 2])
def test_a_stopped_process_is_found_by_its_silence(run_hosts, failing):
    outcome = run_hosts(3, "train", steps=2000, fail="input_fn", how="stop", host=failing, heartbeat=HEARTBEAT_SECONDS)
    assert outcome.codes[failing] == -9  # by the test, after the others
    # The silence, then the end of two Python processes.
    assert outcome.seconds < HEARTBEAT_SECONDS + 10
    for host in {0, 1, 2} - {failing}:
        assert outcome.codes[host] == 1
        assert re.match(rf"host {failing} of 3 \(.*\) failed in [\w ]+: it has been silent for \d", told(outcome, host))
