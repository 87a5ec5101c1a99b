"""What the tests that kill commands share."""

from collections.abc import Iterator

import pytest

from tests.support.commands import Running


@pytest.fixture(scope="module")
def killed() -> Iterator[list[Running]]:
    """Commands that a module's tests have killed: nothing of them is left, Ray's agents neither, when all have run."""
    commands: list[Running] = []
    yield commands
    assert [command.survivors() for command in commands] == [[]] * len(commands)
