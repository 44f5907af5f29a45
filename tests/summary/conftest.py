"""Every test here leaves the threads and the standard streams as it found them."""

import sys
import threading
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    threads, streams = set(threading.enumerate()), (sys.stdout, sys.stderr)
    yield
    assert set(threading.enumerate()) <= threads
    assert (sys.stdout, sys.stderr) == streams
