"""One process that has imported torch_xla, for all tests of this folder that run the command line."""

import pytest

from tests.faults.commands import Commands


@pytest.fixture(scope="session")
def commands():
    with Commands.open() as opened:
        yield opened
