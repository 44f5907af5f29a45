"""The README keeps its promises: its example runs, and its count of conformance rows is that of the tests."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def rows_with_tests() -> dict[str, set[str]]:
    """Rows with a test named after them, by area."""
    rows = defaultdict(set)
    for path in (ROOT / "tests/conformance").glob("test_*.py"):
        for area, number in re.findall(r"^def test_([a-z]+)_(\d\d)_", path.read_text(), re.MULTILINE):
            rows[area.upper()].add(number)
    return rows


def test_the_count_of_conformance_rows_is_that_of_the_tests():
    told = {area: int(count) for area, count in re.findall(r"^\| ([A-Z]+) .*\| \d+ \| (\d+) \|$", README, re.MULTILINE)}
    held = {area: len(numbers) for area, numbers in rows_with_tests().items()}
    assert {area: count for area, count in told.items() if count} == held
    assert f"| **all** | **180** | **{sum(held.values())}** |" in README


@pytest.mark.slow
def test_the_example_runs_and_learns(tmp_path):
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len(example.strip().splitlines()) <= 40
    script = tmp_path / "example.py"
    script.write_text(example)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    accuracy = re.search(r"\{'accuracy': ([\d.]+), 'loss': [\d.]+, 'global_step': 200\}", done.stdout)
    assert accuracy and float(accuracy[1]) > 0.95, done.stdout
