"""Every fault that the project knows of has a test with its number in its name."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
FAULTS = set(range(1, 56))
# Without a test yet. A number that gets one must leave this list.
OPEN: set[int] = set()


def numbered_faults() -> set[int]:
    """The numbers in the names of all tests: test_fault_02_04_after_a_kill has two."""
    found = set()
    for path in TESTS.rglob("test_*.py"):
        for numbers in re.findall(r"^ *(?:async )?def test_fault_((?:\d\d_)+)", path.read_text(), re.MULTILINE):
            found |= {int(number) for number in numbers.split("_") if number}
    return found


def test_every_fault_has_a_test_with_its_number_or_is_listed_as_open():
    found = numbered_faults()
    assert found <= FAULTS, "no such fault"
    assert sorted(FAULTS - found) == sorted(OPEN), "OPEN lists exactly the faults that have no test"
