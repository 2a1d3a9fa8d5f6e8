"""Every check of checks.py, on the world sizes that it is listed for."""

import functools

import pytest

from tests.parallel import checks, ranks

CASES = [(size, check.__name__) for size, found in checks.CHECKS.items() for check in found]


@functools.cache
def results(size: int) -> dict[str, str]:
    return ranks.run(size, [check.__name__ for check in checks.CHECKS[size]])


@pytest.mark.parametrize(("size", "name"), CASES)
def test_parity(size: int, name: str) -> None:
    error = results(size)[name]
    assert not error, error
