import pytest

from tpuspec.errors import ConfigError
from tpuspec.testing import ManualClock


def test_the_clock_stands_until_it_is_moved():
    clock = ManualClock(start=5.0)
    assert [clock(), clock()] == [5.0, 5.0]
    clock.advance(1.5)
    clock.advance(0)
    assert clock() == 6.5


def test_the_clock_does_not_go_back():
    with pytest.raises(ConfigError, match="goes forward only; got seconds=-1"):
        ManualClock().advance(-1)
