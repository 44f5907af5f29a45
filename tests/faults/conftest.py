"""One process that has imported torch_xla, for all tests of this folder that run the command line."""

import pytest

from tests.faults.commands import Commands
from tests.faults.zygote_process import open_zygote


@pytest.fixture(scope="session")
def zygote():
    with open_zygote() as opened:
        yield opened


@pytest.fixture(scope="session")
def commands(zygote):
    return Commands(zygote)
