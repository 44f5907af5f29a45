"""The arithmetic of bench_step.py, and that its workers answer; the times themselves are never asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"


@pytest.fixture
def bench_step(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_step

    return bench_step


def measured(bench_step, contender, times):
    return bench_step.Measured(workload="mlp", contender=contender, times=times, num_steps=10, versions={"torch": "2"})


class FakeWorker:
    def __init__(self, contender, calls):
        self.contender, self.versions, self._calls = contender, {}, calls

    def measure(self, workload, num_steps):
        self._calls.append(self.contender)
        return float(len(self._calls))


def test_a_ratio_is_the_median_of_the_ratios_of_each_repeat(bench_step):
    # The second repeat ran on a busy machine: both were slow in it.
    trainer = measured(bench_step, "tpuspec_trainer", [1.0, 10.0, 1.0])
    loop = measured(bench_step, "traced_loop", [7.0, 50.0, 6.0])
    assert loop.ratio_to(trainer) == 6.0
    line = json.loads(loop.line(trainer))
    assert (line["median"], line["spread"], line["ratio_to_trainer"]) == (7.0, [6.0, 50.0], 6.0)


def test_repeats_interleave_and_each_begins_with_another_worker(bench_step):
    calls = []
    workers = [FakeWorker(name, calls) for name in "abc"]
    results = bench_step.interleave(workers, "mlp", num_steps=10, repeats=3)
    assert calls == [*"abc", *"abc", *"bca", *"cab"]
    assert [list(result.times) for result in results] == [[4, 9, 11], [5, 7, 12], [6, 8, 10]]


def test_the_table_has_a_line_for_each_result(bench_step):
    trainer = measured(bench_step, "tpuspec_trainer", [2.0])
    lines = bench_step.table([trainer, measured(bench_step, "jax_jit", [1.0])]).splitlines()
    assert [line.split()[1] for line in lines] == ["contender", "tpuspec_trainer", "jax_jit"]
    assert lines[2].split()[-1] == "0.50"


def test_a_contender_whose_packages_are_missing_says_so_and_takes_no_part():
    code = ("import sys, importlib.util; find = importlib.util.find_spec\n"
            "importlib.util.find_spec = lambda name: None if name in ('jax', 'optax') else find(name)\n"
            f"sys.path.insert(0, {str(BENCHMARKS)!r})\n"
            "from step_contenders.worker import serve; serve('jax_jit')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, input="", check=True)
    assert json.loads(done.stdout) == {"missing": "jax and optax not installed: pip install 'tpuspec[bench]'"}


@pytest.mark.slow
def test_loop_and_trainer_are_measured_side_by_side(tmp_path):
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "bench_step.py"), "--workloads", "mlp", "--contenders", "tpuspec_trainer",
         "traced_loop", "--repeats", "2", "--steps", "3"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["contender"] for line in lines] == ["tpuspec_trainer", "traced_loop"]
    assert all(line["median"] > 0 and line["repeats"] == 2 for line in lines)
